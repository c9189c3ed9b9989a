"""Batch k is a function of seed, rank and k, whoever produces it and wherever a run started."""

from __future__ import annotations

import pytest
import torch
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter

from lgssl_nnunet.data import batches as batches_module
from lgssl_nnunet.data.batches import STREAMS, SeededBatches, start_workers
from lgssl_nnunet.engine.seeding import seed_everything


@pytest.fixture(scope="module")
def loaders(build_trainer):
    """The loaders of a training, with nnU-Net's augmentation and both views."""
    trainer = build_trainer("LGSSLTrainer")
    trainer.on_train_start()
    return trainer.dataloader_train.data_loader.loaders


@pytest.fixture
def batches(loaders):
    def make(seed: int = 0, **options) -> SeededBatches:
        return SeededBatches(loaders, seed, **options)

    return make


@pytest.fixture(scope="module")
def reference(loaders):
    return [SeededBatches(loaders, 0).batch(index) for index in range(6)]


@pytest.fixture
def asked_threads(monkeypatch) -> list[int]:
    """Lets this process act as a worker, without its number of threads, its signals and its process group."""
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(batches_module, "_live_and_die_with_the_trainer", lambda: None)
    return asked


def test_a_batch_holds_the_labeled_and_the_unlabeled_stream(reference):
    assert set(reference[0]) == {"data", "target", "keys", "unlabeled_data", "unlabeled_keys"}
    assert all(key.startswith("labeled") for key in reference[0]["keys"])
    assert all(key.startswith("unlabeled") for key in reference[0]["unlabeled_keys"])


def test_batches_differ_from_each_other(reference):
    first = [batch["unlabeled_data"] for batch in reference]
    assert all(not torch.equal(first[0], other) for other in first[1:])


@pytest.mark.parametrize("start", [0, 2, 5])
def test_a_stream_that_starts_late_gives_the_same_batches(start, batches, reference, same):
    stream = batches(start=start)
    for index in range(start, 6):
        assert same(next(stream), reference[index])


def test_global_generators_neither_matter_nor_move(batches, reference, same):
    stream = batches()
    for index in range(2):
        seed_everything(100 + index)
        expected = torch.rand(3)
        seed_everything(100 + index)
        assert same(next(stream), reference[index])
        assert torch.equal(torch.rand(3), expected)


def test_order_does_not_matter(batches, reference, same):
    stream = batches()
    for index in (4, 0, 3):
        assert same(stream.batch(index), reference[index])


@pytest.mark.parametrize("options", [{"seed": 1}, {"rank": 1}])
def test_another_seed_or_rank_draws_other_batches(options, batches, reference, same):
    assert not same(batches(**options).batch(0), reference[0])


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 2])
def test_workers_together_produce_the_same_stream(workers, start, batches, reference, same, asked_threads):
    streams = []
    for worker in range(workers):
        streams.append(batches(start=start, num_workers=workers))
        streams[-1].set_thread_id(worker)
    for index in range(start, 6):
        assert same(next(streams[(index - start) % workers]), reference[index])


def test_a_worker_computes_on_one_thread(batches, asked_threads):
    batches(num_workers=2).set_thread_id(1)
    assert asked_threads == [1]


def test_the_streams_of_one_batch_are_drawn_independently(loaders, reference, same):
    alone = SeededBatches({"unlabeled": loaders["unlabeled"]}, 0).batch(0)
    assert same(alone, {name: reference[0][name] for name in ("unlabeled_data", "unlabeled_keys")})
    assert len(set(STREAMS)) == 3


def test_without_workers_batches_come_from_this_process(batches, reference, same):
    iterator = start_workers(batches(), pin_memory=False)
    assert isinstance(iterator, SingleThreadedAugmenter)
    assert same(next(iterator), reference[0])


def test_validation_batches_do_not_depend_on_the_training_stream(build_trainer, same):
    def validation_batch(training_batches: int):
        trainer = build_trainer("SupervisedTrainer")
        trainer.on_train_start()
        for _ in range(training_batches):
            next(trainer.dataloader_train)
        return next(trainer.dataloader_val)

    assert same(validation_batch(0), validation_batch(2))
