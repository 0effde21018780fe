"""Cached greedy decoding against decoding without a cache, and the scores that evaluation takes from the model."""

import torch

from model.decoding import Decoding
from model.generation import greedy
from model.transformer import token_nll, token_scores
from tests.test_engine import VOCABULARY, make_batch
from tests.test_model_transformer import plain_inputs, randomised

BOS, EOS = 1, 2


def greedy_without_cache(model, source, limit, end):
    output = [BOS]
    while len(output) <= limit:
        rows = [torch.tensor([source]), torch.tensor([output])]
        inputs = tuple(
            part
            for row in rows
            for part in (row, torch.arange(row.shape[1])[None], torch.ones_like(row, dtype=torch.int32))
        )
        output.append(int(model.logits(inputs)[0, -1].argmax()))
        if output[-1] == end:
            break
    return output[1:]


def sources(count):
    random = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 9, (count,), generator=random).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=random).tolist() for length in lengths]


def test_cached_decoding_equals_decoding_without_a_cache():
    model, batch = randomised().train(), sources(12)
    with torch.no_grad():
        for name in ("query", "key"):
            getattr(model.decoder_2.cross_attention, name).weight.mul_(8)
    endless = greedy(model, batch, BOS, -1, 15)
    assert model.training
    assert {len(output) for output in endless} == {15}
    # A token that only some rows come upon takes the part of the end.
    end = next(token for token in range(VOCABULARY) if 2 < sum(token in output for output in endless) < 10)
    found = greedy(model, batch, BOS, end, 15)
    model.eval()
    assert found == [greedy_without_cache(model, source, 15, end) for source in batch]
    assert [output[: len(short)] for output, short in zip(endless, found, strict=True)] == found
    assert all((end in output) == (found[row][-1] == end) for row, output in enumerate(endless))


def test_cached_logits_equal_the_whole_pass_for_any_tokens():
    model, (source, target) = randomised(), plain_inputs([6, 3, 5], [7, 7, 7])[::3]
    rows, kept = [[int(token) for token in row if token] for row in source], torch.tensor([2, 0])
    whole = model.logits(plain_inputs([6, 3, 5], [7, 7, 7]))
    with torch.no_grad():
        decoding = Decoding(model, rows)
        for step in range(7):
            if step == 4:
                decoding.select(kept)
                target, whole = target[kept], whole[kept]
            torch.testing.assert_close(decoding.advance(target[:, step]), whole[:, step], atol=1e-5, rtol=0)


def test_each_new_token_costs_one_position():
    model, seen = randomised(), []
    hook = model.decoder_0.feed_forward.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[:2]))
    with torch.no_grad():
        decoding = Decoding(model, sources(3))
        for _ in range(5):
            decoding.advance(torch.full((3,), BOS))
    hook.remove()
    assert seen == [(3, 1)] * 5


def test_an_empty_source_and_an_empty_batch_are_fine():
    assert greedy(randomised(), [], BOS, EOS, 5) == []
    outputs = greedy(randomised(), [[], [5, 6]], BOS, EOS, 5)
    assert all(1 <= len(output) <= 5 for output in outputs)
    assert outputs[1] == greedy(randomised(), [[5, 6]], BOS, EOS, 5)[0]


def test_token_scores_equal_the_log_softmax_of_each_label():
    model, batch = randomised(), make_batch(0, 2, rows=5)
    nll, best = token_scores(model, batch, chunk_rows=2)
    logits = model.logits(batch.inputs).double()
    for row in range(5):
        for position in range(batch.labels.shape[1]):
            if batch.loss_weight[row, position] == 0:
                assert nll[row, position] == 0
                continue
            probabilities = logits[row, position].exp() / logits[row, position].exp().sum()
            expected = -probabilities[batch.labels[row, position]].log()
            assert abs(nll[row, position] - expected) < 1e-5
            assert best[row, position] == logits[row, position].argmax()
    torch.testing.assert_close(token_nll(model, batch), nll, atol=1e-5, rtol=0)


def test_padding_changes_no_score():
    model = randomised()
    wide, narrow = plain_inputs([6, 3], [4, 4]), plain_inputs([6, 3], [4, 4])
    narrow = tuple(tensor[1:, :3] if i < 3 else tensor[1:] for i, tensor in enumerate(narrow))
    torch.testing.assert_close(model.logits(wide)[1:], model.logits(narrow), atol=1e-5, rtol=0)
