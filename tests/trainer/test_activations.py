"""The choice between stored and recomputed activations: the estimate, the free memory, and what a run keeps."""

import os
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from fastflow import checkpoint
from fastflow.models import Glow
from fastflow.trainer import activations, free_memory
from fastflow.trainer.activations import stored_bytes, with_activations_chosen
from fastflow.trainer.cli import main
from fastflow.trainer.config import Config, ConfigError, check_changes, with_choice_kept
from fastflow.trainer.data import Images
from fastflow.trainer.ranks import Ranks

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

CPU = torch.device("cpu")
THINGS = Images("things", np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 3, 8, 8), np.uint8))
TINY = Config(levels=2, steps_per_level=1, hidden=8, batch_size=6)


def glow(network="auto"):
    return Glow((3, 8, 8), levels=2, steps=1, hidden=8, reversible=False, network=network)


@pytest.mark.parametrize("network", ["plain", "fused", "auto"])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_estimate_is_what_a_forward_pass_saves(bf16, network):
    build = partial(glow, network)
    model, x = build().eval(), torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    saved = {}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if bf16 else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), autocast:
        model(x, seed=0)
    for kept in (*model.parameters(), *model.buffers()):
        saved.pop(kept.untyped_storage().data_ptr(), None)
    measured = sum(storage.nbytes() for storage in saved.values())
    estimated, weights = stored_bytes(build, 4, CPU, bf16)
    assert estimated == pytest.approx(measured, rel=0.02)
    assert weights == sum(p.nbytes for p in model.parameters())


def chosen(config, free, monkeypatch, ranks=None, device=CPU):
    """The choice if an image takes 1 MB of activations, and the weights 2 MB."""
    monkeypatch.setattr(activations, "free_bytes", lambda device: free)
    monkeypatch.setattr(
        activations, "stored_bytes", lambda build, samples, device, bf16: (10**6 * samples, 2 * 10**6)
    )
    return with_activations_chosen(config, THINGS, ranks or Ranks(), device, False)


def test_activations_are_stored_if_they_fit_in_a_share_of_what_is_left(monkeypatch):
    """Weights, gradients and Adam's two averages take 8 MB, averaged weights another 2 MB."""
    least = 6e6 / activations.STORED_SHARE + 8e6
    config, line = chosen(TINY, least, monkeypatch)
    assert config == replace(TINY, reversible="no")
    assert line == "activations: stored, 6 MB estimated of 12 MB free"
    config, line = chosen(TINY, least - 1, monkeypatch)
    assert (
        config.reversible == "yes"
        and line == "activations: recomputed, 6 MB estimated of 12 MB free if stored"
    )
    assert chosen(replace(TINY, ema=0.9), least, monkeypatch)[0].reversible == "yes"
    assert chosen(replace(TINY, ema=0.9), least + 2e6, monkeypatch)[0].reversible == "no"
    in_parts = replace(TINY, accumulate=2)
    assert chosen(in_parts, 3e6 / activations.STORED_SHARE + 8e6, monkeypatch)[0].reversible == "no"


def test_nothing_is_estimated_if_nothing_is_to_be_chosen(monkeypatch):
    monkeypatch.setattr(activations, "_estimate", None)
    for value in ("yes", "no"):
        config = replace(TINY, reversible=value)
        assert chosen(config, 1e12, monkeypatch) == (config, None)
    config, line = chosen(replace(TINY, activation_checkpoint_every=2), 1e12, monkeypatch)
    assert config.reversible == "yes" and line == "activations: recomputed, one in some steps is stored"
    config, line = chosen(TINY, None, monkeypatch, device=torch.device("mps"))
    assert config.reversible == "yes" and line.endswith("the free memory of mps is unknown")


class TwoRanks(Ranks):
    """The first of two ranks; on the other one activations do not fit."""

    def all_reduce_sum(self, values, long_timeout=False):
        assert long_timeout
        return values


def test_all_ranks_store_or_none(monkeypatch):
    config, line = chosen(TINY, 1e12, monkeypatch, TwoRanks(0, 2))
    assert config.reversible == "yes" and line.endswith(
        "another rank has too little free memory to store them"
    )


def test_ranks_on_one_machine_share_its_memory(monkeypatch):
    for count, value in (("4", "yes"), ("3", "no")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
        assert chosen(TINY, 60e6, monkeypatch)[0].reversible == value


def test_other_devices_than_cpu_and_cuda_have_unknown_memory():
    assert free_memory.free_bytes(torch.device("meta")) is None
    free = free_memory.free_bytes(CPU)
    assert free is None or 0 <= free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    "line, folder, names",
    [
        ("0::/job/task", "job", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:cpu,memory:/job",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_limits_of_control_groups_bound_the_free_memory(line, folder, names, tmp_path):
    """The limit is on a parent of the process's own group; pages of files count as free."""
    (tmp_path / "own").write_text(f"1:name=systemd:/\n{line}\n")
    assert free_memory._left_in_cgroup(tmp_path, tmp_path / "own") == float("inf")
    group = tmp_path / folder
    group.mkdir()
    limit, usage, inactive = names
    (group / limit).write_text("max\n" if limit == "memory.max" else f"{2**63}\n")
    assert free_memory._left_in_cgroup(tmp_path, tmp_path / "own") > 1e18
    for name, text in ((limit, "1000\n"), (usage, "700\n"), ("memory.stat", f"anon 1\n{inactive} 200\n")):
        (group / name).write_text(text)
    assert free_memory._left_in_cgroup(tmp_path, tmp_path / "own") == 500


def test_a_run_stores_its_choice_and_keeps_it(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "images.npz", x=np.random.default_rng(0).integers(0, 60, (20, 8, 8, 3), np.uint8))
    argv = "--levels 2 --steps-per-level 1 --hidden 8 --batch-size 6 --samples 1 --final-samples 1".split()
    argv = [
        "train",
        "--data",
        str(tmp_path / "images.npz"),
        *argv,
        "--steps",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    monkeypatch.setattr(activations, "free_bytes", lambda device: 2e9)
    assert main(argv) == 0
    assert re.search(
        r"^activations: stored, 0\.0\d+ MB estimated of 2 GB free$", capsys.readouterr().out, re.MULTILINE
    )
    monkeypatch.setattr(activations, "free_bytes", lambda device: 0.0)
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "2", "--reversible", "auto"]) == 0
    contents = checkpoint.read(tmp_path / "run" / "last.pt")
    assert contents["training"]["config"]["reversible"] == "no" and not contents["config"]["reversible"]
    assert "activations:" not in capsys.readouterr().out
    assert main(["train", "--resume", str(tmp_path / "run"), "--reversible", "yes"]) == 1
    assert "reversible: got yes, expected no as in the run" in capsys.readouterr().err


@pytest.mark.parametrize("old, value", [(True, "yes"), (False, "no")])
def test_runs_of_older_versions_keep_theirs(old, value):
    training = {"config": {"reversible": old}, "step": 0}
    config = with_choice_kept(training, Config(resume="run"))
    assert config.reversible == value
    check_changes(training, config)
    other = replace(config, reversible={"yes": "no", "no": "yes"}[value])
    with pytest.raises(ConfigError, match=f"reversible: got .*, expected {value} as in the run"):
        check_changes(training, with_choice_kept(training, other))
    with pytest.warns(DeprecationWarning, match=f'reversible={old} is now "{value}"'):
        assert Config(reversible=old) == Config(reversible=value)
