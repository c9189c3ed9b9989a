"""What this package takes for granted inside nnU-Net and its libraries, and whether it is still so.

For every function, method or class below, `upstream_contract.json` holds its signature and a hash of its parsed source
(docstrings, comments, layout and type hints do not count), recorded for the releases named there. A mismatch says which
code of ours to compare; when it has been adapted, or needs nothing, record anew:

    python tests/test_upstream_contract.py --write
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest

from lgssl_nnunet.registry import trainer_modules

RECORD = Path(__file__).with_name("upstream_contract.json")
ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("nnunetv2", "batchgenerators", "batchgeneratorsv2", "dynamic_network_architectures")

BASE = "trainers/base.py: SemiSupervisedTrainer"
DESCO = "trainers/desco.py: DeSCOTrainer"
PREDICTOR = "lgssl_nnunet/inference/predictor.py: LGSSLPredictor"
BATCHES = "lgssl_nnunet/data/batches.py: SeededBatches"
LOADER = "lgssl_nnunet/data/unlabeled.py: UnlabeledLoader"
DATASET = "lgssl_nnunet/data/unlabeled.py: UnlabeledDataset"
SPATIAL = "lgssl_nnunet/data/spatial.py: BoundaryInterpolation"
VIEWS = "lgssl_nnunet/data/views.py: ViewsTransform"
VALIDATION = "lgssl_nnunet/engine/validation.py"
EVALUATION_FILES = "lgssl_nnunet/evaluation/evaluation_files.py"
PSEUDO_LABELS = "lgssl_nnunet/inference/pseudo_labels.py"
EXPORT = "lgssl_nnunet/inference/export.py"
CLASSES = "lgssl_nnunet/inference/classes.py"
STORED = "lgssl_nnunet/inference/stored_model.py"
KNOWN = "lgssl_nnunet/inference/known_classes.py"
STOCK = "lgssl_nnunet/inference/stock_model.py"
PREPROCESSING = "lgssl_nnunet/data/preprocessing.py"
RESAMPLING = "lgssl_nnunet/data/resampling.py"
SELECTION_MAPS = "lgssl_nnunet/inference/selection_maps.py"
MIXIN = "plans/planner.py: LGSSLPlanningMixin"
CPU_PLANNER = "plans/planner.py: LGSSLPlannerCPU"
MAKE_PLANS = "plans/planner.py: make_plans"
SECOND_DECODER = "lgssl_nnunet/networks/decoders.py: interpolating_decoder"
NETWORK = "lgssl_nnunet/networks/language_guided.py: LanguageGuidedUNet"
TRAINING = "lgssl_nnunet/training.py"
PLUGIN = "lgssl_nnunet/registry.py: find_trainer"

TRAINER = "nnunetv2/training/nnUNetTrainer/nnUNetTrainer.py: nnUNetTrainer"
NNUNET_PREDICTOR = "nnunetv2/inference/predict_from_raw_data.py: nnUNetPredictor"
NNUNET_LOADER = "nnunetv2/training/dataloading/data_loader.py: nnUNetDataLoader"
DATASETS = "nnunetv2/training/dataloading/nnunet_dataset.py"
IMAGE_IO = "nnunetv2/imageio"
PLANNER = "nnunetv2/experiment_planning/experiment_planners/default_experiment_planner.py: ExperimentPlanner"
RESENC = "nnunetv2/experiment_planning/experiment_planners/residual_unets/residual_encoder_unet_planners.py"
UTILITIES = "nnunetv2/utilities"
SLIM_LOADER = "batchgenerators/dataloading/data_loader.py: SlimDataLoaderBase"
AUGMENTER = "batchgenerators/dataloading/multi_threaded_augmenter.py"
TRANSFORMS = "batchgeneratorsv2/transforms"
BLOCKS = "dynamic_network_architectures/building_blocks"

# What upstream has -> who of ours depends on it (the first one overrides or imitates it).
WATCHED: dict[str, tuple[str, ...]] = {
    # The trainer: methods that ours overrides, with or without super().
    f"{TRAINER}.__init__": (f"{BASE}.__init__",),
    f"{TRAINER}.initialize": (f"{BASE}.initialize",),
    f"{TRAINER}.configure_optimizers": (f"{BASE}.configure_optimizers",),
    f"{TRAINER}.set_deep_supervision_enabled": (f"{BASE}.set_deep_supervision_enabled",),
    f"{TRAINER}.do_split": (f"{BASE}.do_split",),
    f"{TRAINER}.configure_rotation_dummyDA_mirroring_and_inital_patch_size": (
        f"{BASE}.configure_rotation_dummyDA_mirroring_and_inital_patch_size",
    ),
    f"{TRAINER}.get_dataloaders": (f"{BASE}.get_dataloaders",),
    f"{TRAINER}.on_train_start": (
        f"{BASE}.on_train_start",
        "trainers/pseudo_label.py: PseudoLabelTrainer.on_train_start",
        f"{DESCO}.on_train_start",
    ),
    f"{TRAINER}.print_plans": (f"{BASE}.print_plans",),
    f"{TRAINER}.train_step": (f"{BASE}.train_step",),
    f"{TRAINER}.on_train_epoch_end": (f"{BASE}.on_train_epoch_end",),
    f"{TRAINER}.validation_step": (f"{BASE}.validation_step", f"{VALIDATION}: hard_counts"),
    f"{TRAINER}.on_train_end": (f"{BASE}.on_train_end",),
    f"{TRAINER}.save_checkpoint": (f"{BASE}.save_checkpoint",),
    f"{TRAINER}.load_checkpoint": (f"{BASE}.load_checkpoint",),
    f"{TRAINER}.build_network_architecture": (
        f"{BASE}.build_network_architecture",
        "trainers/mcf.py: MCFTrainer.build_network_architecture",
        "trainers/co_bionet.py: CoBioNetTrainer.build_network_architecture",
        "trainers/lg_ssl.py: LGSSLTrainer.build_network_architecture",
        f"{STORED}: StoredModel.build_network",
    ),
    # The trainer: methods that ours calls, or whose order of calls it counts on.
    f"{TRAINER}.run_training": (f"{BASE}.run_training", f"{BASE}._run_epoch", f"{TRAINING}: train"),
    f"{TRAINER}.on_epoch_start": (f"{BASE}._run_epoch",),
    f"{TRAINER}.on_train_epoch_start": (f"{BASE}.train_step",),
    f"{TRAINER}.on_epoch_end": (f"{BASE}.save_checkpoint",),
    f"{TRAINER}.on_validation_epoch_start": (f"{BASE}.validation_step",),
    f"{TRAINER}.on_validation_epoch_end": (f"{BASE}.validation_step",),
    f"{TRAINER}.perform_actual_validation": (
        f"{BASE}.perform_actual_validation",
        f"{TRAINING}: _validate",
        f"{BASE}.do_split",
        f"{VALIDATION}: leave_out_of_summary",
    ),
    f"{TRAINER}.get_tr_and_val_datasets": (f"{BASE}.get_dataloaders", f"{DESCO}.get_tr_and_val_datasets"),
    f"{TRAINER}.get_training_transforms": (f"{BASE}.get_dataloaders", VIEWS, f"{DESCO}.get_training_transforms"),
    f"{TRAINER}.get_validation_transforms": (f"{BASE}.get_dataloaders",),
    f"{TRAINER}._get_deep_supervision_scales": (f"{BASE}.get_dataloaders",),
    f"{TRAINER}._set_batch_size_and_oversample": (f"{BASE}.initialize",),
    f"{TRAINER}._build_loss": (f"{BASE}.supervised_loss", "lgssl_nnunet/losses/marginal.py: marginal_logits"),
    f"{TRAINER}._do_i_compile": (f"{BASE}.plain_network",),
    f"{TRAINER}._save_debug_information": (f"{BASE}.on_train_start",),
    f"{TRAINER}.print_to_log_file": (f"{BASE}.on_train_start",),
    "nnunetv2/training/logging/nnunet_logger.py: MetaLogger": (f"{BASE}.on_train_epoch_end",),
    "nnunetv2/training/lr_scheduler/polylr.py: PolyLRScheduler": (
        f"{BASE}.configure_optimizers",
        "lgssl_nnunet/engine/schedules.py: CosineSchedule",
    ),
    f"{UTILITIES}/collate_outputs.py: collate_outputs": (f"{BASE}.on_train_epoch_end",),
    f"{UTILITIES}/crossval_split.py: generate_crossval_split": ("plans/folds.py: fold_cases",),
    f"{UTILITIES}/default_n_proc_DA.py: get_allowed_n_proc_DA": (f"{BASE}._start",),
    f"{UTILITIES}/helpers.py: empty_cache": (
        f"{BASE}.on_train_start",
        f"{PREDICTOR}._internal_predict_sliding_window_return_logits",
    ),
    # Commands of nnU-Net that ours mirror or hand over to, and how they find our trainers.
    "nnunetv2/run/run_training.py: get_trainer_from_args": (f"{TRAINING}: _build",),
    "nnunetv2/run/run_training.py: maybe_load_checkpoint": (f"{TRAINING}: _load_weights",),
    "nnunetv2/run/run_training.py: find_free_network_port": ("lgssl_nnunet/engine/launching.py: launch",),
    "nnunetv2/run/load_pretrained_weights.py: load_pretrained_weights": (
        "lgssl_nnunet/engine/pretrained.py: load_pretrained",
    ),
    f"{UTILITIES}/find_objects.py: recursive_find_trainer_class_by_name": (PLUGIN,),
    f"{UTILITIES}/find_class_by_name.py: recursive_find_python_class": (PLUGIN, "plans/plan.py: _check_preprocessor"),
    f"{UTILITIES}/find_class_by_name.py: _recursive_find_python_class": (PLUGIN,),
    # Training data.
    f"{NNUNET_LOADER}.__init__": (f"{LOADER}.__init__", f"{BASE}._labeled_loader"),
    f"{NNUNET_LOADER}.get_bbox": (LOADER, f"{DATASET}.load_case"),
    f"{NNUNET_LOADER}.generate_train_batch": (f"{BATCHES}.batch", f"{DATASET}.load_case", f"{VIEWS}.apply"),
    f"{DATASETS}: nnUNetBaseDataset.__init__": (f"{DATASET}.__init__",),
    f"{DATASETS}: nnUNetDatasetBlosc2.__init__": (f"{DATASET}.__init__",),
    f"{DATASETS}: nnUNetDatasetBlosc2.load_case": (f"{DATASET}.load_case",),
    f"{DATASETS}: nnUNetDatasetBlosc2.get_identifiers": (f"{DATASET}.get_identifiers",),
    f"{DATASETS}: nnUNetDatasetBlosc2.save_case": ("plans/preprocessing.py: _save",),
    f"{DATASETS}: nnUNetDatasetBlosc2._select_filter": ("plans/preprocessing.py: _save_array",),
    f"{DATASETS}: comp_blosc2_params": (
        "plans/preprocessing.py: _save_array",
        f"{PSEUDO_LABELS}: _write_case",
        "lgssl_nnunet/data/sparse.py: write_annotation",
    ),
    f"{DATASETS}: infer_dataset_class": ("plans/preprocessing.py: CaseFolders",),
    "batchgenerators/dataloading/data_loader.py: DataLoader.get_indices": (f"{BATCHES}.batch",),
    f"{SLIM_LOADER}.__init__": (f"{BATCHES}.__init__",),
    f"{SLIM_LOADER}.set_thread_id": (f"{BATCHES}.set_thread_id",),
    f"{SLIM_LOADER}.__next__": (f"{BATCHES}.__next__",),
    f"{AUGMENTER}: producer": (f"{BATCHES}.set_thread_id",),
    f"{AUGMENTER}: results_loop": (f"{BATCHES}.__next__",),
    f"{AUGMENTER}: MultiThreadedAugmenter.__init__": ("lgssl_nnunet/data/batches.py: start_workers",),
    f"{AUGMENTER}: MultiThreadedAugmenter._start": ("lgssl_nnunet/data/batches.py: start_workers",),
    f"{AUGMENTER}: MultiThreadedAugmenter.__next__": ("lgssl_nnunet/data/batches.py: start_workers",),
    f"{AUGMENTER}: MultiThreadedAugmenter._finish": (f"{BASE}.on_train_end",),
    "batchgenerators/dataloading/single_threaded_augmenter.py: SingleThreadedAugmenter": (
        "lgssl_nnunet/data/batches.py: start_workers",
    ),
    f"{TRANSFORMS}/base/basic_transform.py: BasicTransform.__init__": (f"{VIEWS}.__init__",),
    f"{TRANSFORMS}/base/basic_transform.py: BasicTransform.__call__": (f"{VIEWS}.apply",),
    f"{TRANSFORMS}/base/basic_transform.py: BasicTransform.apply": (f"{VIEWS}.apply",),
    f"{TRANSFORMS}/base/basic_transform.py: ImageOnlyTransform": (
        "lgssl_nnunet/data/views.py: is_intensity_transform",
    ),
    f"{TRANSFORMS}/utils/compose.py: ComposeTransforms": (VIEWS,),
    f"{TRANSFORMS}/utils/random.py: RandomTransform": ("lgssl_nnunet/data/views.py: is_intensity_transform",),
    f"{TRANSFORMS}/spatial/spatial.py: SpatialTransform": (SPATIAL,),
    f"{TRANSFORMS}/spatial/spatial.py: SpatialTransform._apply_to_segmentation": (SPATIAL,),
    f"{TRANSFORMS}/spatial/spatial.py: SpatialTransform._may_reach_outside": (SPATIAL,),
    f"{TRANSFORMS}/noise/gaussian_blur.py: GaussianBlurTransform": ("lgssl_nnunet/data/views.py: make_deterministic",),
    # Planning and preprocessing.
    f"{PLANNER}.__init__": (f"{CPU_PLANNER}.__init__", MAKE_PLANS),
    f"{PLANNER}.static_estimate_VRAM_usage": (
        f"{MIXIN}.static_estimate_VRAM_usage",
        f"{CPU_PLANNER}.static_estimate_VRAM_usage",
    ),
    f"{PLANNER}.generate_data_identifier": (f"{MIXIN}.generate_data_identifier",),
    f"{PLANNER}.get_plans_for_configuration": (f"{CPU_PLANNER}.get_plans_for_configuration",),
    f"{PLANNER}.plan_experiment": (MAKE_PLANS, "plans/planner.py: _staged_dataset_json"),
    f"{PLANNER}.save_plans": (MAKE_PLANS,),
    "nnunetv2/experiment_planning/experiment_planners/network_topology.py: get_pool_and_conv_props": (
        "plans/planner.py: _topology",
    ),
    f"{RESENC}: ResEncUNetPlanner.__init__": ("plans/planner.py: LGSSLPlannerResEncM",),
    f"{RESENC}: ResEncUNetPlanner.generate_data_identifier": (f"{MIXIN}.generate_data_identifier",),
    f"{RESENC}: ResEncUNetPlanner.get_plans_for_configuration": (f"{MIXIN}.static_estimate_VRAM_usage",),
    f"{RESENC}: nnUNetPlannerResEncM": ("plans/planner.py: LGSSLPlannerResEncM",),
    f"{RESENC}: nnUNetPlannerResEncL": ("plans/planner.py: LGSSLPlannerResEncL",),
    f"{RESENC}: nnUNetPlannerResEncXL": ("plans/planner.py: LGSSLPlannerResEncXL",),
    "nnunetv2/experiment_planning/dataset_fingerprint/fingerprint_extractor.py: "
    "DatasetFingerprintExtractor.collect_foreground_intensities": ("plans/fingerprint.py: _sample",),
    "nnunetv2/experiment_planning/dataset_fingerprint/fingerprint_extractor.py: "
    "DatasetFingerprintExtractor.analyze_case": ("plans/fingerprint.py: analyze_case",),
    "nnunetv2/experiment_planning/dataset_fingerprint/fingerprint_extractor.py: DatasetFingerprintExtractor.run": (
        "plans/fingerprint.py: extract_fingerprint",
    ),
    "nnunetv2/preprocessing/cropping/cropping.py: crop_to_nonzero": (
        "plans/fingerprint.py: analyze_case",
        "lgssl_nnunet/data/cropping.py: nonzero_box",
    ),
    "nnunetv2/preprocessing/cropping/cropping.py: create_nonzero_mask": ("lgssl_nnunet/data/cropping.py: outside",),
    "nnunetv2/preprocessing/preprocessors/default_preprocessor.py: DefaultPreprocessor.run_case": (
        "plans/preprocessing.py: _preprocess_as_planned",
        "lgssl_nnunet/inference/predictor.py: _preprocess_as_nnunet",
        f"{PREPROCESSING}: preprocess",
    ),
    "nnunetv2/preprocessing/preprocessors/default_preprocessor.py: DefaultPreprocessor.run_case_npy": (
        f"{PREPROCESSING}: preprocess",
        "plans/preprocessing.py: _preprocess_as_planned",
    ),
    "nnunetv2/preprocessing/preprocessors/default_preprocessor.py: DefaultPreprocessor.run_case_save": (
        "plans/preprocessing.py: _save",
    ),
    "nnunetv2/preprocessing/preprocessors/default_preprocessor.py: DefaultPreprocessor._normalize": (
        f"{PREPROCESSING}: _normalise",
        f"{KNOWN}: _foreign_steps",
    ),
    "nnunetv2/preprocessing/preprocessors/default_preprocessor.py: DefaultPreprocessor._sample_foreground_locations": (
        f"{PSEUDO_LABELS}: _write_case",
        f"{PREPROCESSING}: class_locations",
    ),
    **{
        f"nnunetv2/preprocessing/normalization/default_normalization_schemes.py: {scheme}": (
            f"{PREPROCESSING}: _normalise",
        )
        for scheme in (
            "CTNormalization",
            "NoNormalization",
            "RescaleTo01Normalization",
            "RGBTo01Normalization",
            "ZScoreNormalization",
        )
    },
    "nnunetv2/imageio/reader_writer_registry.py: determine_reader_writer_from_dataset_json": (
        "plans/cases.py: find_reader",
    ),
    # Prediction and evaluation.
    f"{NNUNET_PREDICTOR}.__init__": (f"{PREDICTOR}.__init__",),
    f"{NNUNET_PREDICTOR}.initialize_from_trained_model_folder": (
        f"{PREDICTOR}.load_model",
        f"{STORED}: _read_folder",
        f"{STOCK}: _stock_checkpoint",
    ),
    f"{NNUNET_PREDICTOR}.manual_initialization": (f"{PREDICTOR}.manual_initialization",),
    f"{NNUNET_PREDICTOR}.predict_logits_from_preprocessed_data": (
        f"{PREDICTOR}.predict_logits_from_preprocessed_data",
        f"{PREDICTOR}._logits",
        f"{PSEUDO_LABELS}: _label_map",
    ),
    f"{NNUNET_PREDICTOR}.predict_sliding_window_return_logits": (
        f"{PREDICTOR}._internal_predict_sliding_window_return_logits",
    ),
    f"{NNUNET_PREDICTOR}._internal_get_sliding_window_slicers": (f"{PREDICTOR}._sum_of_windows",),
    f"{NNUNET_PREDICTOR}._internal_predict_sliding_window_return_logits": (
        f"{PREDICTOR}._internal_predict_sliding_window_return_logits",
    ),
    f"{NNUNET_PREDICTOR}._internal_maybe_mirror_and_predict": (f"{PREDICTOR}._predict_views",),
    f"{NNUNET_PREDICTOR}.predict_from_files_sequential": (f"{PREDICTOR}.predict_files",),
    "nnunetv2/inference/sliding_window_prediction.py: compute_gaussian": (f"{PREDICTOR}._sum_of_windows",),
    "nnunetv2/inference/export_prediction.py: export_prediction_from_logits": (
        "lgssl_nnunet/inference/predictor.py: _export",
    ),
    "nnunetv2/inference/export_prediction.py: convert_predicted_logits_to_segmentation_with_correct_shape": (
        f"{SELECTION_MAPS}: SelectionMapPredictor._on_image_grid",
        f"{EXPORT}: write_segmentation",
    ),
    "nnunetv2/preprocessing/resampling/default_resampling.py: determine_do_sep_z_and_axis": (
        f"{EXPORT}: nearest_axis",
        f"{RESAMPLING}: nearest_axis",
    ),
    "nnunetv2/preprocessing/resampling/default_resampling.py: compute_new_shape": (f"{RESAMPLING}: new_shape",),
    "nnunetv2/preprocessing/resampling/default_resampling.py: resample_data_or_seg": (
        f"{EXPORT}: segment",
        f"{RESAMPLING}: resample_image",
    ),
    "batchgenerators/augmentations/utils.py: resize_segmentation": (f"{RESAMPLING}: resample_labels",),
    "batchgenerators/augmentations/utils.py: _resample_seg_by_argmax": (f"{RESAMPLING}: _vote",),
    f"{IMAGE_IO}/simpleitk_reader_writer.py: SimpleITKIO.write_seg": (
        f"{SELECTION_MAPS}: _itk_image",
        "plans/merge.py: _write_changed",
    ),
    "nnunetv2/preprocessing/normalization/map_channel_name_to_normalization.py: get_normalization_scheme": (
        "plans/merged_sources.py: _channel_problems",
    ),
    f"{IMAGE_IO}/simpleitk_reader_writer.py: SimpleITKIOWithReorient": (f"{SELECTION_MAPS}: _itk_image",),
    f"{IMAGE_IO}/nibabel_reader_writer.py: NibabelIO": (f"{SELECTION_MAPS}: _nibabel_image",),
    f"{IMAGE_IO}/nibabel_reader_writer.py: NibabelIOWithReorient": (f"{SELECTION_MAPS}: _nibabel_image",),
    "nnunetv2/evaluation/evaluate_predictions.py: compute_metrics": (
        "lgssl_nnunet/evaluation/case.py: measure_case",
        "lgssl_nnunet/evaluation/case.py: _CheckedReader",
    ),
    "nnunetv2/evaluation/evaluate_predictions.py: region_or_label_to_mask": (
        "lgssl_nnunet/evaluation/case.py: measure_case",
    ),
    "nnunetv2/evaluation/evaluate_predictions.py: compute_metrics_on_folder": (f"{EVALUATION_FILES}: _summary",),
    "nnunetv2/evaluation/evaluate_predictions.py: save_summary_json": (
        f"{EVALUATION_FILES}: write_results",
        f"{VALIDATION}: leave_out_of_summary",
    ),
    "nnunetv2/evaluation/evaluate_predictions.py: load_summary_json": (f"{VALIDATION}: leave_out_of_summary",),
    "nnunetv2/evaluation/evaluate_predictions.py: label_or_region_to_key": (
        "lgssl_nnunet/evaluation/case.py: _overlap",
    ),
    f"{UTILITIES}/json_export.py: recursive_fix_for_json_export": (f"{EVALUATION_FILES}: _summary",),
    # Plans, labels and networks.
    f"{UTILITIES}/plans_handling/plans_handler.py: PlansManager": (f"{STORED}: _stored", f"{BASE}.__init__"),
    f"{UTILITIES}/plans_handling/plans_handler.py: PlansManager.__init__": (f"{CLASSES}: PlansForClasses.__init__",),
    f"{UTILITIES}/label_handling/label_handling.py: LabelManager.__init__": (f"{CLASSES}: ChosenClasses.__init__",),
    f"{UTILITIES}/plans_handling/plans_handler.py: PlansManager.get_label_manager": (
        f"{CLASSES}: PlansForClasses.get_label_manager",
    ),
    f"{UTILITIES}/label_handling/label_handling.py: LabelManager.convert_probabilities_to_segmentation": (
        f"{CLASSES}: ChosenClasses.convert_probabilities_to_segmentation",
    ),
    f"{UTILITIES}/label_handling/label_handling.py: LabelManager.has_regions": (f"{CLASSES}: ChosenClasses",),
    f"{UTILITIES}/plans_handling/plans_handler.py: ConfigurationManager": (
        "lgssl_nnunet/networks/language_guided.py: build_language_guided_unet",
        f"{BASE}.get_dataloaders",
        f"{KNOWN}: require_known_classes",
    ),
    f"{UTILITIES}/label_handling/label_handling.py: LabelManager": (
        "lgssl_nnunet/engine/labels.py: one_hot",
        "lgssl_nnunet/data/partial_labels.py: PartialLabel.known_channels",
        "lgssl_nnunet/evaluation/evaluate.py: _label_manager",
        f"{SELECTION_MAPS}: one_channel",
        "plans/dataset_json.py: label_problems",
    ),
    f"{UTILITIES}/label_handling/label_handling.py: determine_num_input_channels": (
        f"{STORED}: StoredModel.num_channels",
    ),
    # What plans name, and where nnU-Net looks for it.
    f"{UTILITIES}/label_handling/label_handling.py: get_labelmanager_class_from_plans": (f"{KNOWN}: _foreign_steps",),
    f"{IMAGE_IO}/reader_writer_registry.py: recursive_find_reader_writer_by_name": (f"{KNOWN}: known_reader",),
    "nnunetv2/preprocessing/resampling/utils.py: recursive_find_resampling_fn_by_name": (f"{KNOWN}: _foreign_steps",),
    "nnunetv2/model_sharing/model_import.py: install_model_from_zip_file": (f"{STOCK}: write_stock_zip",),
    f"{UTILITIES}/get_network_from_plans.py: get_network_from_plans": (
        "lgssl_nnunet/networks/language_guided.py: build_language_guided_unet",
        f"{MIXIN}.static_estimate_VRAM_usage",
        f"{KNOWN}: _foreign_layers",
    ),
    f"{BLOCKS}/unet_decoder.py: UNetDecoder.__init__": (SECOND_DECODER,),
    f"{BLOCKS}/unet_decoder.py: UNetDecoder.forward": (
        "lgssl_nnunet/networks/unet.py: decode",
        SECOND_DECODER,
        f"{NETWORK}.forward",
    ),
    "nnunetv2/training/loss/deep_supervision.py: DeepSupervisionWrapper": (f"{BASE}.at_every_scale",),
    f"{BLOCKS}/unet_decoder.py: UNetDecoder.compute_conv_feature_map_size": (f"{MIXIN}.static_estimate_VRAM_usage",),
    f"{BLOCKS}/plain_conv_encoder.py: PlainConvEncoder": (SECOND_DECODER, f"{NETWORK}.forward"),
    f"{BLOCKS}/residual_encoders.py: ResidualEncoder": (SECOND_DECODER, f"{NETWORK}.forward"),
    f"{BLOCKS}/simple_conv_blocks.py: ConvDropoutNormReLU.__init__": (
        "lgssl_nnunet/networks/decoders.py: _upsampling_step",
    ),
    f"{BLOCKS}/helper.py: convert_conv_op_to_dim": (SECOND_DECODER,),
    f"{BLOCKS}/helper.py: convert_dim_to_conv_op": ("lgssl_nnunet/text/adapter.py: AttentionPrompts",),
    f"{BLOCKS}/helper.py: get_matching_instancenorm": (
        "lgssl_nnunet/networks/tvsf.py: TextVisionSelectionFusion.__init__",
    ),
    "dynamic_network_architectures/initialization/weight_init.py: InitWeights_He": (SECOND_DECODER,),
}

# Imported for isinstance, a type hint or one documented call; nothing inside them matters.
ONLY_NAMED = {
    "batchgenerators/utilities/file_and_folder_operations.py: load_pickle",
    "batchgenerators/utilities/file_and_folder_operations.py: write_pickle",
    f"{TRANSFORMS}/spatial/mirroring.py: MirrorTransform",
    f"{TRANSFORMS}/utils/pseudo2d.py: Convert2DTo3DTransform",
    f"{TRANSFORMS}/utils/pseudo2d.py: Convert3DTo2DTransform",
    "nnunetv2/configuration.py: ANISO_THRESHOLD",
    "nnunetv2/imageio/base_reader_writer.py: BaseReaderWriter",
    "nnunetv2/preprocessing/normalization/default_normalization_schemes.py: ImageNormalization",
    "nnunetv2/imageio/simpleitk_reader_writer.py: SimpleITKIO",
}

# Our class -> the upstream classes whose methods it overrides or calls on itself.
SUBCLASSES = {
    BASE: (TRAINER,),
    **{f"trainers/{module.rpartition('.')[2]}.py: {name}": (TRAINER,) for name, module in trainer_modules().items()},
    PREDICTOR: (NNUNET_PREDICTOR,),
    DATASET: (f"{DATASETS}: nnUNetDatasetBlosc2",),
    LOADER: (NNUNET_LOADER,),
    BATCHES: (SLIM_LOADER,),
    VIEWS: (f"{TRANSFORMS}/base/basic_transform.py: BasicTransform",),
    MIXIN: (PLANNER, f"{RESENC}: ResEncUNetPlanner"),
    CPU_PLANNER: (PLANNER,),
    f"{CLASSES}: ChosenClasses": (f"{UTILITIES}/label_handling/label_handling.py: LabelManager",),
    f"{CLASSES}: PlansForClasses": (f"{UTILITIES}/plans_handling/plans_handler.py: PlansManager",),
}

# Fields of a syntax tree that say nothing about what the code does, or that differ between Python versions.
_IRRELEVANT = {"ctx", "kind", "type_comment", "type_params", "annotation", "returns"}
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def describe(target: str) -> dict[str, str]:
    """Return signature and source hash of "path/in/site-packages.py: Class.method".

    Raises:
        LookupError: there is no such file, function, method or class.
    """
    node = find_definition(upstream_file(target), target)
    if isinstance(node, ast.ClassDef):
        signature = f"class({', '.join(ast.unparse(base) for base in node.bases)})"
    else:
        parts = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        for argument in filter(None, parts):
            argument.annotation = None
        signature = f"({ast.unparse(node.args)})"
    source = json.dumps(canonical(node))
    return {"signature": signature, "source": hashlib.sha256(source.encode()).hexdigest()[:16]}


def canonical(node: object) -> object:
    """Return a syntax tree as nested lists, without docstrings, type hints and positions."""
    if isinstance(node, list):
        return [canonical(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if name not in _IRRELEVANT}
    if isinstance(node, _DEFINITIONS) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    filled = [[name, canonical(value)] for name, value in fields.items() if value is not None and value != []]
    return [type(node).__name__, *filled]


def upstream_file(target: str) -> Path:
    """Return the file of a target, found without importing anything."""
    library, _, rest = target.split(": ")[0].partition("/")
    return Path(importlib.util.find_spec(library).submodule_search_locations[0]) / rest


def find_definition(file: Path, target: str) -> ast.ClassDef | ast.FunctionDef:
    """Return the definition that a target names in a file."""
    node = parse(file)
    for name in target.split(": ")[1].split("."):
        node = definitions(node).get(name)
        if node is None:
            raise LookupError(f"{file.name} has no {target.split(': ')[1]}")
    return node


def definitions(node: ast.AST) -> dict[str, ast.AST]:
    """Return the functions and classes that a module or class defines, by name."""
    return {child.name: child for child in node.body if isinstance(child, _DEFINITIONS)}


@cache
def parse(file: Path) -> ast.Module:
    if not file.is_file():
        raise LookupError(f"there is no {file.name}")
    return ast.parse(file.read_text(encoding="utf-8"))


def record() -> dict[str, dict]:
    """Return what the installed releases look like now."""
    return {
        "releases": {library: version(library) for library in LIBRARIES},
        "watched": {target: describe(target) for target in WATCHED},
    }


def read_record() -> dict[str, dict]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.mark.parametrize("target", WATCHED, ids=list(WATCHED))
def test_upstream_is_as_it_was_when_our_code_was_written(target):
    library = target.split("/")[0]
    recorded = read_record()["watched"].get(target)
    assert recorded is not None, f"{target} has not been recorded: run `python {Path(__file__).name} --write`"
    name = f"{library} {version(library)}"
    compare = f"compare with {' and '.join(WATCHED[target])}"
    try:
        found = describe(target)
    except LookupError as error:
        pytest.fail(f"{name} removed or moved {target} ({error}): {compare}", pytrace=False)
    for what in ("signature", "source"):
        if found[what] != recorded[what]:
            change = f"{recorded[what]} became {found[what]}"
            pytest.fail(f"{name} changed the {what} of {target} ({change}): {compare}", pytrace=False)


def test_the_record_is_that_of_the_pinned_releases():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("#")[0].strip().split("==") for line in lines if "==" in line)
    pinned = {name.lower().replace("-", "_"): release for name, release in pins.items()}
    assert read_record()["releases"] == {library: pinned[library] for library in LIBRARIES}
    assert set(read_record()["watched"]) == set(WATCHED)


@pytest.mark.parametrize("dependent", sorted({name for names in WATCHED.values() for name in names}))
def test_who_depends_on_upstream_is_still_there(dependent):
    file, _, name = dependent.partition(": ")
    assert (ROOT / file).is_file()
    if name:
        find_definition(ROOT / file, dependent)


def imported_from_upstream() -> list[str]:
    """Return "path.py: name" of everything that the package imports from the libraries."""
    folders = ("lgssl_nnunet", "trainers", "plans", "dataset_conversion")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    imports = [node for file in files for node in ast.walk(parse(file)) if isinstance(node, ast.ImportFrom)]
    return sorted(
        {
            f"{node.module.replace('.', '/')}.py: {alias.name}"
            for node in imports
            if node.module and node.module.split(".")[0] in LIBRARIES
            for alias in node.names
        }
    )


@pytest.mark.parametrize("name", imported_from_upstream())
def test_everything_imported_from_upstream_is_watched(name):
    assert name in ONLY_NAMED or any(target == name or target.startswith(f"{name}.") for target in WATCHED)


def unwatched(ours: str, own: ast.ClassDef, upstream: str) -> list[str]:
    """Return what a class of ours overrides in an upstream class, or calls of it on itself, and is not watched."""
    called = {
        node.attr
        for node in ast.walk(own)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    methods = set(definitions(find_definition(upstream_file(upstream), upstream)))
    overridden = methods & set(definitions(own))
    missing = [f"{upstream}.{name}" for name in sorted(methods & called - overridden)]
    missing = [target for target in missing if target not in WATCHED]
    return missing + [
        f"{upstream}.{name} for {ours}.{name}"
        for name in sorted(overridden)
        if f"{ours}.{name}" not in WATCHED.get(f"{upstream}.{name}", ())
    ]


@pytest.mark.parametrize("ours", SUBCLASSES)
def test_every_upstream_method_that_a_subclass_overrides_or_calls_is_watched(ours):
    own = find_definition(ROOT / ours.split(": ")[0], ours)
    assert [target for upstream in SUBCLASSES[ours] for target in unwatched(ours, own, upstream)] == []


def test_every_method_of_this_package_is_looked_at():
    assert {name.split(": ")[1] for name in SUBCLASSES} >= set(trainer_modules())


def test_a_method_that_overrides_or_calls_what_nobody_watches_is_found():
    source = (
        "class NewTrainer:\n"
        "    def on_epoch_start(self): self.plot_network_architecture()\n"
        "    def train_step(self, batch): self.print_to_log_file(self.ramp())\n"
        "    def loss_terms(self): pass\n"
    )
    ours = "trainers/new.py: NewTrainer"
    assert unwatched(ours, ast.parse(source).body[0], TRAINER) == [
        f"{TRAINER}.plot_network_architecture",
        f"{TRAINER}.on_epoch_start for {ours}.on_epoch_start",
        f"{TRAINER}.train_step for {ours}.train_step",
    ]


def change(before: str, after: str) -> bool:
    """Return whether two sources of a function count as different."""
    return canonical(ast.parse(before)) != canonical(ast.parse(after))


def test_comments_layout_docstrings_and_type_hints_are_no_change():
    before = 'def f(self, a: int = 1) -> int:\n    """Old."""\n    # why\n    return (a +\n        1)\n'
    assert not change(before, 'def f(self, a=1):\n    """New\n    words."""\n    return a + 1\n')


@pytest.mark.parametrize(
    "after", ["def f(a, b=1):\n    return a", "def f(a):\n    return -a", "async def f(a): return a"]
)
def test_arguments_and_statements_are_a_change(after):
    assert change("def f(a):\n    return a", after)


def test_a_mismatch_names_release_method_and_the_code_to_compare(monkeypatch):
    target = f"{TRAINER}.train_step"
    changed = read_record()
    changed["watched"][target]["source"] = "0" * 16
    monkeypatch.setitem(globals(), "read_record", lambda: changed)
    with pytest.raises(pytest.fail.Exception, match=r"nnunetv2 \S+ changed the source of .*train_step.*trainers/base"):
        test_upstream_is_as_it_was_when_our_code_was_written(target)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: python {Path(__file__).name} --write (records the installed releases)")
    RECORD.write_text(json.dumps(record(), indent=1) + "\n", encoding="utf-8")
    print(f"Recorded {len(WATCHED)} definitions in {RECORD}")
