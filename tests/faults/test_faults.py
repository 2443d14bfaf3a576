"""Every attack at CI's size."""

import time

import pytest
from faults.attacks import ATTACKS
from faults.lab import Lab


@pytest.mark.parametrize("name", ATTACKS)
def test_promise_survives(name: str, lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    attack = ATTACKS[name]
    began = time.monotonic()
    said = attack.carry_out(lab, attack.ci)
    with capsys.disabled():
        print(f"\n{name}: {said} ({time.monotonic() - began:.0f} s)")
