"""The attempts of a run as a state machine: examples by hand, and properties over random sequences of events."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.recovery import (
    Clear,
    Cleared,
    Commit,
    Discard,
    Ended,
    Fail,
    Failed,
    Finish,
    Launched,
    Preserve,
    Rules,
    Start,
    Started,
    Stepped,
    Stop,
    StopRequested,
    Survey,
    begin,
    decide,
)

RULES = Rules(last_step=20, min_replicas=1, max_replicas=3, max_restarts=1, wait_seconds=60, grow_seconds=5)


def play(rules, *events, state=None):
    """Final state, and the decisions of all events."""
    state, made = state or begin(0.0), []
    for event in events:
        state, decisions = decide(rules, state, event)
        made += decisions
    return state, made


def running(rules=RULES, replicas=3, step=7):
    state, made = play(rules, Survey(0, replicas), Started(1, 1), Stepped(2, 1, step))
    assert [type(decision) for decision in made] == [Start] and state.phase == "running"
    return state


def test_a_run_without_trouble_starts_once_and_finishes():
    state, made = play(RULES, Ended(9, 1, 20), Cleared(10, 1), Survey(11, 3, committed=20), state=running())
    assert [type(decision) for decision in made] == [Clear, Finish] and state.phase == "finished"


def test_a_lost_node_shrinks_the_run_from_the_newest_recoverable_step():
    failed = (Failed(10, 1, "node 2 is gone"), Cleared(10.5, 1))
    state, made = play(RULES, *failed, Survey(11, 2, committed=5, memory=7), state=running())
    start = made[-1]
    assert isinstance(made[0], Clear) and made[0].reason == "node 2 is gone"
    assert (start.replicas, start.step, start.source, start.change) == (2, 7, "memory", "shrink")
    assert "node 2 is gone" in start.reason and state.restarts == 1
    # Without a snapshot in memory: from the commit.
    _, made = play(RULES, *failed, Survey(11, 3, committed=5), state=running())
    assert (made[-1].replicas, made[-1].step, made[-1].source, made[-1].change) == (3, 5, "storage", "same")


def test_nothing_starts_before_the_old_attempt_is_cleared():
    state, made = play(RULES, Failed(10, 1, "lost"), Survey(11, 3, 5), Survey(12, 3, 5), state=running())
    assert [type(decision) for decision in made] == [Clear] and state.live == 1


def test_the_budget_is_spent_without_progress_and_comes_back_with_it():
    def crash(state, at, committed):
        return play(
            RULES, Failed(at, state.attempt, "boom"), Cleared(at, state.attempt), Survey(at, 3, committed), state=state
        )

    state, _ = crash(running(), 10, 5)
    for number, committed in enumerate((6, 7, 8)):
        state, made = crash(state, 20 + number, committed)
        assert isinstance(made[-1], Start) and state.restarts == 1 and "restart 1 of 1" in made[-1].reason
    state, made = crash(state, 40, 8)
    assert isinstance(made[-1], Fail) and made[-1].cause == "restarts" and "boom" in made[-1].reason


def test_room_that_could_not_be_had_is_not_asked_for_again_while_fewer_will_do():
    grown, made = play(
        RULES, Survey(0, 3), Failed(10, 1, "one group is not free", "room"), Cleared(10, 1), Survey(11, 3)
    )
    assert [made[0].replicas, made[-1].replicas] == [3, 2] and grown.restarts == 0
    fixed = replace(RULES, min_replicas=3)
    _, made = play(fixed, Survey(0, 3), Failed(10, 1, "one group is not free", "room"), Cleared(10, 1), Survey(11, 3))
    assert made[-1].replicas == 3


def test_preparing_processes_does_not_count_as_waiting_for_ranks():
    slow = (Launched(170, 1), Survey(171, 3), Survey(229, 3))
    state, made = play(replace(RULES, wait_seconds=60), Survey(0, 3), *slow)
    assert [type(decision) for decision in made] == [Start] and state.phase == "starting"
    _, made = play(replace(RULES, wait_seconds=60), Survey(231, 3), state=state)
    assert isinstance(made[-1], Clear) and "not all ranks started" in made[-1].reason


def test_a_stop_whose_state_was_committed_before_a_loss_is_a_stop():
    lost = (StopRequested(9, "SIGTERM"), Failed(10, 1, "node 2 is gone"), Cleared(11, 1))
    state, made = play(RULES, *lost, Survey(12, 2, committed=7), state=running())
    assert made[-1] == Stop(7, "SIGTERM") and state.phase == "stopped"
    state, made = play(RULES, *lost, Survey(12, 2, committed=6), state=running())
    assert isinstance(made[-1], Fail)


def test_an_error_that_would_come_again_ends_the_run_at_once():
    fatal = Failed(10, 1, "the loss is nan", "fatal")
    state, made = play(RULES, fatal, Cleared(11, 1), Survey(12, 3, 5), state=running())
    assert [type(decision) for decision in made] == [Clear, Fail] and made[-1].cause == "fatal"
    assert play(RULES, Survey(13, 3, 5), StopRequested(14, "x"), state=state)[1] == []


def test_a_damaged_state_is_discarded_and_the_one_before_it_used_whatever_the_budget():
    rules = replace(RULES, max_restarts=0)
    state, _ = play(rules, Survey(0, 3, 9, 10))
    assert (state.from_step, state.source) == (10, "memory")
    for step, source, left in ((10, "memory", (9, 0)), (9, "storage", (6, 0)), (6, "storage", (0, 0))):
        number = state.attempt
        damaged = Failed(1, number, "digest differs", "damaged")
        state, made = play(rules, damaged, Cleared(1, number), Survey(1, 3, 9, 10), state=state)
        assert made[-1] == Discard(step, source, "digest differs")
        state, made = play(rules, Survey(2, 3, *left), state=state)
        assert isinstance(made[-1], Start) and made[-1].step == left[0]


def test_growth_waits_for_progress_and_for_room_that_stays_then_commits_first():
    state, made = play(RULES, Survey(0, 2), Started(1, 1), Survey(2, 3), Survey(9, 3))
    assert len(made) == 1, "grew without a step of its own"
    state, made = play(RULES, Stepped(9, 1, 3), Survey(9.5, 2), Survey(10, 3), Survey(14, 3), state=state)
    assert made == [], "grew for room that came and went"
    state, made = play(RULES, Survey(15.5, 3), state=state)
    assert isinstance(made[0], Commit) and state.phase == "resizing"
    state, made = play(RULES, Ended(17, 1, 9), Cleared(18, 1), Survey(19, 3, committed=9), state=state)
    assert (made[-1].replicas, made[-1].step, made[-1].change) == (3, 9, "grow") and state.restarts == 0


def test_defaults_of_a_fixed_size_never_grow_or_shrink():
    rules = replace(RULES, min_replicas=2, max_replicas=2)
    state, made = play(rules, Survey(0, 5), Stepped(3, 1, 5), *(Survey(at, 5) for at in range(4, 50)))
    assert [type(decision) for decision in made] == [Start] and made[0].replicas == 2
    state, made = play(
        rules, Failed(51, 1, "lost"), Cleared(52, 1), *(Survey(at, 1, 5) for at in range(53, 113)), state=state
    )
    assert [type(decision) for decision in made] == [Clear] and state.phase == "waiting"
    state, made = play(rules, Survey(113, 1, 5), state=state)
    assert made[0].cause == "room"


def test_a_stop_commits_first_and_says_so_when_that_did_not_work():
    asked, made = play(RULES, StopRequested(9, "telar stop"), StopRequested(9.1, "again"), state=running())
    assert made == [Commit(1, "telar stop")]
    _, made = play(RULES, Ended(10, 1, 8), Cleared(11, 1), Survey(12, 3, committed=8), state=asked)
    assert made[-1] == Stop(8, "telar stop")
    _, made = play(RULES, Ended(10, 1, 8), Cleared(11, 1), Survey(12, 3, committed=5), state=asked)
    assert isinstance(made[-1], Fail) and made[-1].cause == "uncommitted"
    _, made = play(RULES, Failed(10, 1, "lost"), Cleared(11, 1), Survey(12, 3, committed=5), state=asked)
    assert isinstance(made[-1], Fail) and made[-1].reason == "lost"
    # Asked between attempts: there is nothing to commit.
    _, made = play(RULES, StopRequested(0.5, "telar stop"), Survey(1, 3, 4))
    assert made == [Stop(4, "telar stop")]


def test_a_stop_while_the_run_recovers_commits_memory_first():
    lost = play(RULES, Failed(10, 1, "lost"), StopRequested(10.2, "SIGTERM"), Cleared(11, 1), state=running())[0]
    state, made = play(RULES, Survey(12, 2, committed=5, memory=7), state=lost)
    assert [type(decision) for decision in made] == [Preserve] and made[0].step == 7 and "SIGTERM" in made[0].reason
    assert play(RULES, Survey(13, 2, committed=7, memory=7), state=state)[1] == [Stop(7, "SIGTERM")]
    # Storage that refuses is asked again as often as an attempt is started again; then the run says that it failed.
    state, made = play(RULES, *(Survey(at, 2, committed=5, memory=7) for at in (13, 14)), state=state)
    assert [type(decision) for decision in made] == [Preserve, Fail] and state.phase == "failed"
    # Nothing newer than the commit is left anywhere.
    assert play(RULES, Survey(12, 2, committed=5), state=lost)[1] == [Stop(5, "SIGTERM")]
    # A loss while the ranks were committing on request: at most the step before is in memory.
    asked = (StopRequested(9, "SIGTERM"), Failed(10, 1, "lost"), Cleared(11, 1))
    _, made = play(RULES, *asked, Survey(12, 2, 5, 6), Survey(13, 2, 6, 6), state=running())
    assert [type(decision) for decision in made] == [Commit, Clear, Preserve, Stop] and made[-1].step == 6


def test_what_lies_in_memory_alone_is_committed_before_the_run_waits_or_fails():
    fixed = replace(RULES, min_replicas=3)
    failed = (Failed(10, 1, "node 2 is gone"), Cleared(11, 1))
    state, made = play(
        fixed, *failed, Survey(12, 2, 5, 7), Survey(13, 2, 7, 7), Survey(14, 2, 7, 7), state=running(fixed)
    )
    assert [type(decision) for decision in made] == [Clear, Preserve] and "room for 2" in made[1].reason
    _, made = play(fixed, Survey(15, 3, 7, 7), state=state)
    assert (made[0].step, made[0].source) == (7, "storage")
    spent = replace(running(), restarts=1, best=7)
    _, made = play(RULES, *failed, Survey(12, 3, 5, 7), Survey(13, 3, 7, 7), state=spent)
    assert [type(decision) for decision in made] == [Clear, Preserve, Fail] and made[-1].cause == "restarts"


@pytest.mark.parametrize("phase", ["running", "starting"])
def test_a_drained_node_is_left_after_a_commit(phase):
    before = running() if phase == "running" else play(RULES, Survey(0, 3))[0]
    state, made = play(RULES, Survey(3, 2, leaving="node 2"), Survey(4, 2, leaving="node 2"), state=before)
    assert [type(decision) for decision in made] == [Commit] and state.phase == "resizing"
    assert play(RULES, Survey(70, 2), state=state)[1][:1] == ([] if phase == "running" else [Clear(1, state_text(70))])
    _, made = play(RULES, Ended(5, 1, 8), Cleared(6, 1), Survey(7, 2, committed=8), state=state)
    assert (made[-1].replicas, made[-1].step, made[-1].change) == (2, 8, "shrink") and "node 2" in made[-1].reason


def state_text(at):
    return f"not all ranks started within {at - 3} s (elastic.start_timeout_seconds)"


def test_a_start_that_hangs_and_room_that_is_not_there_are_given_up():
    state, made = play(RULES, Survey(0, 3), Survey(59, 3), Survey(61, 3))
    assert [type(decision) for decision in made] == [Start, Clear] and state.phase == "clearing"
    state, made = play(
        RULES,
        *(
            event
            for at in range(1, 90, 2)
            for event in (Survey(at, 3), Failed(at, at // 2 + 1, "taken", "room"), Cleared(at + 1, at // 2 + 1))
        ),
    )
    assert state.phase == "failed" and made[-1].cause == "room"


def test_an_attempt_that_ends_without_its_commit_counts_as_failed():
    state, made = play(RULES, Ended(9, 1, 20), Cleared(10, 1), Survey(11, 3, committed=0), state=running())
    assert isinstance(made[-1], Start) and state.restarts == 1 and "nothing is committed" in made[-1].reason


def test_events_of_attempts_that_are_over_change_nothing():
    state, _ = play(RULES, Failed(10, 1, "lost"), Cleared(11, 1), Survey(12, 2, 5), state=running())
    for late in (Started(13, 1), Stepped(13, 1, 19), Ended(13, 1, 20), Failed(13, 1, "x", "fatal"), Cleared(13, 1)):
        assert decide(RULES, state, late) == (state, [])


class World:
    """A cluster and a store that answer decisions with whatever the drawn numbers say, and check the promises."""

    def __init__(self, rules, committed):
        self.rules, self.committed, self.memory = rules, committed, 0
        self.state, self.at = begin(0.0, committed), 0.0
        self.live = None
        self.starts = []
        self.discarded, self.ended, self.preserves = set(), [], 0

    def apply(self, event):
        self.state, decisions = decide(self.rules, self.state, event)
        for decision in decisions:
            assert not self.ended, f"{decision} after {self.ended}"
            assert decision.reason
            if isinstance(decision, Start):
                assert self.live is None, "two live attempts"
                assert self.rules.min_replicas <= decision.replicas <= self.rules.max_replicas
                assert decision.replicas <= event.replicas, "more replicas than the cluster has room for"
                assert decision.step in (0, event.committed, event.memory)
                assert decision.step == max(event.committed, event.memory), "not the newest recoverable state"
                self.live, self.step, self.born = decision.attempt, decision.step, decision
                self.starts.append(decision)
            elif isinstance(decision, (Commit, Clear)):
                assert decision.attempt == self.live
            elif isinstance(decision, Preserve):
                assert self.live is None and event.committed < decision.step == event.memory
                self.preserves += 1
                if self.preserves % 3:
                    self.committed = decision.step
            elif isinstance(decision, Discard):
                assert decision.step == self.born.step and decision.source == self.born.source
                if decision.source == "memory":
                    self.memory = 0
                else:
                    self.committed = min(self.committed, decision.step - 1)
            else:
                assert self.live is None, "the run ended with a live attempt"
                self.ended.append(decision)
        assert (self.state.live is not None) == (self.live is not None)

    def turn(self, choice, amount, replicas):
        """One thing happens. Any attempt number may be named; only those of the live one may matter."""
        self.at += 1 + amount % 3
        at, attempt = self.at, self.live if amount % 5 else self.state.attempt - 1
        real = self.live is not None and attempt == self.live
        if attempt is None:
            attempt = self.state.attempt
        if choice == "survey":
            memory, leaving = self.memory if self.memory > self.committed else 0, "node" if amount % 11 == 0 else ""
            self.apply(Survey(at, replicas, self.committed, memory, leaving))
        elif choice == "started":
            self.apply(Started(at, attempt))
        elif choice == "stepped":
            if real and self.step < self.rules.last_step:
                self.step += 1
                self.memory = self.step if amount % 2 else self.memory
                self.committed = self.step if amount % 7 == 0 else self.committed
            self.apply(Stepped(at, attempt, self.step if real else amount))
        elif choice == "ended":
            if real and amount % 3:
                self.committed = max(self.committed, self.step)
            self.apply(Ended(at, attempt, self.step if real else amount))
        elif choice == "failed":
            kind = ("lost", "lost", "lost", "damaged", "room", "fatal")[amount % 6]
            if real and amount % 4 == 0:
                self.memory = 0
            self.apply(Failed(at, attempt, kind, kind))
        elif choice == "cleared":
            if real and self.state.phase == "clearing":
                self.live = None
            self.apply(Cleared(at, attempt))
        else:
            self.apply(StopRequested(at, "asked"))


TURNS = st.lists(
    st.tuples(
        st.sampled_from(
            ["survey"] * 6 + ["stepped"] * 4 + ["failed", "cleared", "cleared", "ended", "started", "stop"]
        ),
        st.integers(0, 100),
        st.integers(0, 6),
    ),
    max_size=200,
)
ALL_RULES = st.builds(
    lambda last, low, more, restarts: Rules(last, low, low + more, restarts, wait_seconds=30, grow_seconds=4),
    st.integers(1, 15),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(0, 3),
)


@settings(deadline=None, max_examples=300)
@given(rules=ALL_RULES, committed=st.integers(0, 8), turns=TURNS)
def test_promises_hold_over_random_events(rules, committed, turns):
    world = World(rules, min(committed, rules.last_step))
    for turn in turns:
        world.turn(*turn)
    assert len(world.ended) <= 1 and world.state.over == bool(world.ended)


@settings(deadline=None, max_examples=200)
@given(rules=ALL_RULES, seed=st.randoms(use_true_random=False), size=st.integers(0, 6))
def test_every_run_ends_when_the_world_goes_on(rules, seed, size):
    """No stop is asked for; attempts step, fail, are damaged or end at random for as long as the run takes."""
    world = World(rules, 0)
    choices = ["survey"] * 4 + ["stepped"] * 3 + ["failed", "cleared", "cleared", "ended"]
    turns = 0
    while not world.state.over:
        turns += 1
        assert turns < 20_000, f"does not end: {world.state}"
        world.turn(seed.choice(choices), seed.randrange(100), seed.choice((size, rules.max_replicas)))
    if isinstance(world.ended[0], Finish):
        assert world.committed >= rules.last_step
    # Every start spends budget, follows progress, a discarded state, a growth or a want of room.
    assert len(world.starts) <= 20_000


@pytest.mark.parametrize("restarts", [0, 1, 3])
def test_a_run_that_never_gets_anywhere_starts_exactly_its_budget(restarts):
    rules, world = replace(RULES, max_restarts=restarts), None
    world = World(rules, 0)
    while not world.state.over:
        for choice, amount in (("survey", 1), ("started", 1), ("failed", 1), ("cleared", 1)):
            world.turn(choice, amount, 3)
    assert len(world.starts) == restarts + 1 and world.ended[0].cause == "restarts"
