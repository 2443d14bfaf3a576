"""The GPU check, with injected drivers and cards: there is none where these tests run."""

import subprocess

import pytest

from wake2vec.errors import WakeError
from wake2vec.machine import MIB, Card, Gpus, check_gpu, machine, probe, problems

T4 = Card("Tesla T4", 15360 * MIB, (7, 5))
H100 = Card("NVIDIA H100 80GB HBM3", 81559 * MIB, (9, 0))
BLACKWELL = Card("NVIDIA RTX PRO 6000", 97887 * MIB, (12, 0))


@pytest.mark.parametrize("card", [T4, H100, BLACKWELL])
@pytest.mark.parametrize("driver", ["570.86.15", "580.65", "600.1"])
def test_known_cards_and_drivers_pass(card: Card, driver: str) -> None:
    assert check_gpu("12.8", required=True, gpus=Gpus((card,), driver)) == []


@pytest.mark.parametrize("driver", ["569.99", "550.54.15", "99.1", None, "N/A"])
def test_an_older_driver_is_refused_with_both_versions(driver: str | None) -> None:
    with pytest.raises(WakeError, match=f"{driver or 'unknown'} is installed, CUDA 12.8 needs 570 or newer"):
        check_gpu("12.8", required=True, gpus=Gpus((T4,), driver))


@pytest.mark.parametrize(("capability", "said"), [((7, 0), "7.0"), ((6, 1), "6.1"), ((13, 0), "13.0")])
def test_a_card_outside_the_wheels_range_is_refused(capability: tuple[int, int], said: str) -> None:
    with pytest.raises(WakeError, match=f"Old is compute {said}, torch's wheel covers 7.5 to 12.9"):
        check_gpu("12.8", required=True, gpus=Gpus((T4, Card("Old", None, capability)), "570.1"))


def test_a_gpu_asked_for_but_absent_stops_the_start() -> None:
    with pytest.raises(WakeError, match="none is visible"):
        check_gpu("12.8", required=True, gpus=Gpus())
    assert check_gpu("12.8", required=False, gpus=Gpus()) == []


def test_what_is_wrong_is_only_said_where_no_gpu_was_asked_for() -> None:
    assert len(check_gpu("12.8", required=False, gpus=Gpus((T4,), "550.1"))) == 1


def test_every_problem_stands_in_one_message() -> None:
    with pytest.raises(WakeError) as caught:
        check_gpu("12.8", required=True, gpus=Gpus((Card("Old", None, (6, 0)),), "470.1"))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(("cuda", "said"), [(None, "without CUDA"), ("99.0", "torch has CUDA 99.0")])
def test_a_torch_without_a_known_cuda_is_refused(cuda: str | None, said: str) -> None:
    assert said in problems(Gpus((T4,), "570.1"), cuda)[0]


def test_nvidia_smi_is_read() -> None:
    answer = "NVIDIA H100 80GB HBM3, 81559, 9.0, 570.86.15\nNVIDIA GB10, [N/A], 12.1, 570.86.15\n"
    assert probe(lambda _: answer) == Gpus((H100, Card("NVIDIA GB10", None, (12, 1))), "570.86.15")


def test_no_nvidia_smi_means_no_gpu() -> None:
    def absent(_: tuple[str, ...]) -> str:
        raise FileNotFoundError

    assert probe(absent) == Gpus()


def test_a_gpu_lost_to_the_container_is_named_as_such() -> None:
    def lost(command: tuple[str, ...]) -> str:
        raise subprocess.CalledProcessError(255, command, "Failed to initialize NVML: Unknown Error\n", "")

    gpus = probe(lost)
    assert gpus.cards == ()
    with pytest.raises(WakeError, match="Failed to initialize NVML: Unknown Error; restart the container"):
        check_gpu("12.8", required=True, gpus=gpus)


@pytest.mark.parametrize("answer", ["No devices were found\n", "a, b\n", "T4, 1, nan, 570.1\n"])
def test_an_answer_that_is_no_table_is_trouble_not_a_traceback(answer: str) -> None:
    assert "nvidia-smi answers" in str(probe(lambda _: answer).trouble)


def test_a_silent_nvidia_smi_is_trouble() -> None:
    def hangs(command: tuple[str, ...]) -> str:
        raise subprocess.TimeoutExpired(command, 60)

    assert probe(hangs).trouble == "nvidia-smi does not answer"


def test_the_description_holds_no_host_name() -> None:
    here = machine(Gpus((T4,), "570.1"))
    assert set(here) == {"cpu", "cores", "memory_bytes", "gpus", "driver", "kernel"}
    assert here["gpus"] == [{"name": "Tesla T4", "memory_bytes": 15360 * MIB, "capability": (7, 5)}]
