"""Copies for a checkpoint hold what was there, are contiguous, and are not reached by what comes after."""

import torch

from regpt2.training.host_copy import HostCopies


def test_copies_keep_their_values_when_the_tensors_change() -> None:
    copies = HostCopies()
    tensors = {"w": torch.arange(6.0).view(2, 3).T, "step": torch.tensor(3.0)}
    taken = copies.take(tensors)
    for tensor in tensors.values():
        tensor.zero_()
    assert taken["w"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert taken["w"].is_contiguous()
    assert taken["step"] == 3.0


def test_two_takes_of_a_cpus_tensors_share_no_memory() -> None:
    copies, weight = HostCopies(), torch.ones(3)
    first = copies.take({"w": weight})
    weight.zero_()
    assert not copies.take({"w": weight})["w"].any()
    assert first["w"].all()
