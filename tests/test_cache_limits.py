"""Data larger than the cache: the cache keeps its limit, and the run says what to set."""

from cluster.storage import Storage
from configs.schema import CorpusSection, DataSection
from data.open_shards import OpenShards
from data.opener import cache_advice
from tests.shard_data import ROWS
from tests.test_shard_faults import opener_of, store  # noqa: F401 - a fixture


def test_a_reader_closes_maps_so_that_the_cache_keeps_its_limit(store, tmp_path):  # noqa: F811
    limit = 3 * store.infos[0].bytes
    opener = opener_of(store, tmp_path / "cache", cache_bytes=limit)
    shards = OpenShards(lambda number: store.infos[number], opener, blocks_at_once=4)
    rows = {info.path: iter(store.tokens[info.path]) for info in store.infos}
    sizes = []
    for row in range(ROWS):
        for number, info in enumerate(store.infos):
            block, at = shards.find(number, row)
            source, _, labels, _ = block.row(at)
            assert [source.tolist(), labels.tolist()] == next(rows[info.path])
            sizes.append(sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.arrow")))
    assert max(sizes) <= limit
    assert opener.statistics()["evictions"] > 0


def test_data_larger_than_the_cache_in_blocks_smaller_than_shards_get_advice(store):  # noqa: F811
    remote, sizes = Storage(store.url), {"shard_rows": 40, "block_rows": 4, "cache_bytes": 1000}
    corpora = (CorpusSection(name="c", kind="text", path="x", target="{text}"),)

    def advice(storage=remote, **changed):
        return cache_advice(storage, store.manifest, DataSection(corpora=corpora, **(sizes | changed)))

    # 5 shards of 10 rows of 12 tokens of 2 bytes are 1,200 bytes.
    assert (
        "up to 10 times" in advice()
        and "at most 1" in advice()
        and "data.block_rows" in advice()
        and "data.cache_bytes" in advice()
    )
    assert advice(cache_bytes=1200) is None
    assert advice(block_rows=40) is None
    assert advice(storage=store.storage) is None
