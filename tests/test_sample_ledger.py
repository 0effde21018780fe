"""Ledger of a run whose ranks are killed 20 times and resume at other world sizes: no sample lost, none doubled."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.mixture import make_order
from tests.ledger_run import row_digest
from tests.sample_data import expected_row, numbered, prepare_samples

ROWS, BATCH, KILLS = 600, 12, 20
CAPACITIES = (12, 16)


@pytest.mark.parametrize("layout", ["pairs", "sequence"])
def test_no_sample_is_lost_or_doubled_over_twenty_kills_and_resizes(tmp_path, layout):
    samples = numbered(np.random.default_rng(5), ROWS, layout, *CAPACITIES)
    config, _, manifest = prepare_samples(tmp_path, {"only": samples}, layout, CAPACITIES, steps=ROWS // BATCH)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-m", "tests.ledger_run", str(tmp_path), "11", str(KILLS)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    attempts = json.loads(done.stdout)
    assert sum(attempt["killed"] for attempt in attempts) >= KILLS - 3
    assert len({attempt["world"] for attempt in attempts}) > 4

    committed = []
    for number, attempt in enumerate(attempts):
        entries = []
        for path in tmp_path.glob(f"ledger-{number}-*.jsonl"):
            # The last line of a killed rank may be cut; its step was not committed.
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            entries += map(json.loads, lines)
        within = [entry for entry in entries if attempt["begin"] < entry["consumed"] <= attempt["end"]]
        committed += sorted(within, key=lambda entry: (entry["consumed"], entry["index"]))
    trained = [row for entry in committed for row in entry["rows"]]

    by_first_label = {
        int(np.concatenate(sample[0])[0] if layout == "sequence" else sample[0][1][0]): sample for sample in samples
    }
    ids = [first for first, _ in trained]
    assert len(ids) == len(set(ids)) == ROWS and set(ids) == set(by_first_label), "samples lost or doubled"
    for first, found in trained:
        assert found == row_digest(expected_row(by_first_label[first], layout, CAPACITIES)), "a token differs"
    rows = make_order(manifest, config)(np.arange(ROWS))[2]
    assert ids == [list(by_first_label)[row] for row in rows.tolist()], "another order than that without kills"
