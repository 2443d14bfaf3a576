"""Every attack, how often CI carries it out and how often `bench/torture.py` does."""

from collections.abc import Callable
from typing import NamedTuple

from faults.damage import damage
from faults.disk import full_disk, hanging_volume
from faults.fuzz import fuzz
from faults.hostile import hostile_files, not_finite
from faults.keeping import imports, prune, retention, soak
from faults.kills import kills
from faults.lab import Lab
from faults.memory import short_of_memory
from faults.model_check import model_check
from faults.power import power_cuts, storms
from faults.preemption import preemption
from faults.surroundings import surroundings
from faults.writers import one_writer


class Attack(NamedTuple):
    """An attack: what carries it out and says what it did, and how often."""

    carry_out: Callable[[Lab, int], str]
    ci: int
    long: int


ATTACKS = {
    "kill": Attack(kills, 40, 500),
    "power cut": Attack(power_cuts, 20, 200),
    "power cut, back-to-back saves": Attack(storms, 40, 1000),
    "power cut, as a model": Attack(model_check, 3, 12),
    "damaged file": Attack(damage, 200, 2000),
    "full disk": Attack(full_disk, 6, 50),
    "hanging volume": Attack(hanging_volume, 2, 20),
    "one writer": Attack(one_writer, 2, 20),
    "preemption": Attack(preemption, 20, 100),
    "hostile files": Attack(hostile_files, 1, 3),
    "NaN and Inf": Attack(not_finite, 1, 10),
    "memory": Attack(short_of_memory, 8, 100),
    "surroundings": Attack(surroundings, 1, 5),
    "what a user types": Attack(fuzz, 1500, 100_000),
    "imports": Attack(imports, 2, 20),
    "prune": Attack(prune, 8, 200),
    "retention": Attack(retention, 600, 3000),
    "soak": Attack(soak, 2000, 20_000),
}
