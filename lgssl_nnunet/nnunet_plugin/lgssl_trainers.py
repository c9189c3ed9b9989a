"""Every trainer of this package under one module, so that nnU-Net's own commands find them.

Set `nnUNet_extTrainer` to this file's folder (`lgssl_info --ext_trainer_path` prints it).
"""

from lgssl_nnunet.registry import find_trainer, trainer_names

globals().update({name: find_trainer(name) for name in trainer_names()})
