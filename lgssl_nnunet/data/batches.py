"""The stream of training batches: batch k is a function of seed, rank and k."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Any

import torch
from batchgenerators.dataloading.data_loader import SlimDataLoaderBase
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from lgssl_nnunet.engine.batches import finest
from lgssl_nnunet.engine.seeding import derive_seed, isolated_randomness
from lgssl_nnunet.errors import TrainingError
from lgssl_nnunet.workers import end_with_parent

STREAMS = ("labeled", "unlabeled", "validation")


class SeededBatches(SlimDataLoaderBase):
    """Draws batch k of each stream under a seed of its own, so that only k has to be remembered to resume.

    Worker w of W produces the batches w, w + W, w + 2 W, ...; batchgenerators' MultiThreadedAugmenter collects them in
    that order, so the number of workers does not change the stream.

    Args:
        loaders: stream name (of `STREAMS`) to nnU-Net loader. The entries of "unlabeled" get that prefix in the batch.
        seed: training seed.
        rank: process index in distributed training.
        start: index of the first batch.
        num_workers: number of worker processes, 0 for none.
    """

    def __init__(
        self, loaders: Mapping[str, nnUNetDataLoader], seed: int, rank: int = 0, start: int = 0, num_workers: int = 0
    ) -> None:
        first = next(iter(loaders.values()))
        super().__init__(None, first.batch_size, num_workers)
        self.loaders = dict(loaders)
        self.seed = seed
        self.rank = rank
        self.start = start
        self.stride = max(num_workers, 1)
        self.produced = 0

    def set_thread_id(self, thread_id: int) -> None:
        """Remember which worker this copy belongs to; called in the worker process.

        One thread each: besides the cores being taken, a forked process that uses the parent's thread pool hangs.
        """
        super().set_thread_id(thread_id)
        torch.set_num_threads(1)
        _live_and_die_with_the_trainer()

    def __next__(self) -> dict[str, Any]:
        index = self.start + self.thread_id + self.produced * self.stride
        self.produced += 1
        return self.batch(index)

    def batch(self, index: int) -> dict[str, Any]:
        """Return batch `index`."""
        combined: dict[str, Any] = {}
        for name, loader in self.loaders.items():
            with isolated_randomness(derive_seed(self.seed, self.rank, STREAMS.index(name), index)):
                part = loader.generate_train_batch()
            if name == "unlabeled":
                # Views have an empty target, pseudo-labelled patches a real one.
                kept = part if finest(part["target"]).numel() else {"data", "keys"}
                part = {f"unlabeled_{entry}": part[entry] for entry in kept}
            combined.update(part)
        return combined


def start_workers(batches: SeededBatches, pin_memory: bool) -> SingleThreadedAugmenter | MultiThreadedAugmenter:
    """Return an iterator over `batches`, produced in its number of worker processes."""
    workers = batches.number_of_threads_in_multithreaded
    if not workers:
        return SingleThreadedAugmenter(batches, None)
    return MultiThreadedAugmenter(
        batches, None, workers, num_cached_per_queue=3, pin_memory=pin_memory, wait_time=0.002
    )


def next_batch(batches: SingleThreadedAugmenter | MultiThreadedAugmenter) -> dict[str, Any]:
    """Return the next batch.

    Raises:
        TrainingError: a worker process died.
    """
    try:
        return next(batches)
    except RuntimeError as error:
        if not isinstance(batches, MultiThreadedAugmenter) or not batches.abort_event.is_set():
            raise
        raise TrainingError(
            "A process that prepares batches died, most likely because memory ran out or a preprocessed file is "
            "damaged (what it said stands above): set the environment variable nnUNet_n_proc_DA to fewer processes, "
            "and go on with --c."
        ) from error


def stop_workers(*iterators: SingleThreadedAugmenter | MultiThreadedAugmenter) -> None:
    """End the worker processes of iterators made by `start_workers`."""
    for batches in iterators:
        if isinstance(batches, MultiThreadedAugmenter):
            batches._finish()


def _live_and_die_with_the_trainer() -> None:
    """Let a worker survive signals to the trainer, which still finishes its step, but not the trainer's end."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how its trainer ends it
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    end_with_parent()
