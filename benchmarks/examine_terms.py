"""How well finished models fit their labelled patches, and how strongly each term pulls at the encoder.

    export nnUNet_raw=... nnUNet_preprocessed=... nnUNet_results=...
    python benchmarks/examine_terms.py 510 --plans LGSSLCPUPlans_labeled4 SupervisedTrainer ACMTTrainer

For a method that ends below SupervisedTrainer: whether it has learnt its labelled cases at all. Per trainer, from
checkpoint_final.pth of fold all: nnU-Net's loss on augmented labelled patches with the network as it trains (dropout)
and as it predicts, and the norm of each term's gradient in the encoder, times its weight in the last iteration, as a
share of the norm of the supervised terms'. Nothing is written to the results folder.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lgssl_nnunet.engine.seeding import seed_everything
from lgssl_nnunet.files import environment, read_json
from lgssl_nnunet.plans.stored import load_plans, preprocessed_folder
from lgssl_nnunet.registry import find_trainer


def finished(name: str, dataset: str, plans_name: str, configuration: str) -> object:
    """Return the trainer in the state of its last iteration, writing into a temporary folder."""
    folder = preprocessed_folder(dataset)
    model = Path(os.environ["nnUNet_results"]) / folder.name / f"{name}__{plans_name}__{configuration}"
    plans = {**load_plans(folder, plans_name), "continue_training": False}
    dataset_json = read_json(folder / "dataset.json")
    with environment({"nnUNet_results": tempfile.mkdtemp()}):
        trainer = find_trainer(name)(plans, configuration, "all", dataset_json, torch.device("cpu"))
    trainer.initialize()
    trainer.load_checkpoint(str(model / "fold_all" / "checkpoint_final.pth"))
    trainer.current_epoch = 0
    trainer.on_train_start()
    trainer.iteration = trainer.num_iterations - 1
    return trainer


def labeled_loss(trainer: object, batches: list, training: bool) -> float:
    trainer.network.train(training)
    with torch.no_grad():
        losses = [float(trainer.supervised_loss(trainer.network(b.image), b.target)) for b, _ in batches]
    trainer.network.train()
    return float(np.mean(losses))


def pulls(trainer: object, batch: tuple) -> dict[str, float]:
    """Return the norm of each term's weighted gradient in the encoder of the prediction network."""
    seed_everything(0)
    norms = {}
    for name, term in trainer.loss_terms(*batch).items():
        trainer.network.zero_grad(set_to_none=True)
        if term.value.requires_grad:
            term.value.backward(retain_graph=True)
        found = [p.grad for key, p in trainer.network.named_parameters() if "encoder." in key and p.grad is not None]
        norms[name] = term.weight * float(torch.sqrt(sum((g.square().sum() for g in found), torch.zeros(()))))
    return norms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("trainers", nargs="+")
    parser.add_argument("--plans", required=True)
    parser.add_argument("-c", default="3d_fullres")
    parser.add_argument("--batches", type=int, default=4)
    args = parser.parse_args()
    os.environ["nnUNet_n_proc_DA"] = "0"
    rows = []
    for name in tqdm(args.trainers):
        trainer = finished(name, args.dataset, args.plans, args.c)
        batches = [trainer.to_batches(next(trainer.dataloader_train)) for _ in range(args.batches)]
        norms = [pulls(trainer, batch) for batch in batches]
        means = {term: float(np.mean([n[term] for n in norms])) for term in norms[0]}
        first = next(iter(means.values()))
        shares = ", ".join(f"{term} {value / first:.3f}" for term, value in means.items())
        losses = [f"{labeled_loss(trainer, batches, training):.3f}" for training in (True, False)]
        rows.append(f"| {name} | {' | '.join(losses)} | {shares} |")
    print("| trainer | labelled loss, training | labelled loss, predicting | pull at the encoder, first term = 1 |")
    print("| --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
