"""`bench.py many` in small: real peers, several to a process, all meet and lose nobody. 64 of them: by command."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from benches import many


def test_five_peers_in_two_processes_form_rounds_and_leave_nothing_behind():
    found = many.measure(argparse.Namespace(
        quick=False, peers=5, processes=2, seconds=4.0, round_s=1.0, bits=4, seed=1
    ))
    assert found["settled"] and found["heads"] == found["truths_of_a_version"] == 1
    assert found["lost_tokens"] == found["left_behind"] == found["pending_tokens"] == 0
    assert found["committed_tokens"] == found["trained_tokens"] > 0 and found["rounds"] > 0
    assert found["contributors"]["max"] == 5
