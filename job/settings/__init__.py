"""Environment variables in, one frozen `Settings` out."""

from job.settings.data import DataSettings
from job.settings.dataset_spec import DatasetSpec, Where, data_suffixes, distinct_labels, package_file
from job.settings.eval_prompts import EvalPrompt
from job.settings.evaluate import EvaluateSettings
from job.settings.identity import data_fingerprint, data_identity, default_run_id, is_hub_id, result_fingerprint
from job.settings.keep import BudgetSettings, FinishSettings, KeepSettings, PublishSettings, Secrets
from job.settings.read import RECIPES_DIR, Configuration, Settings, known_names, read_settings, read_store
from job.settings.train import LoraSettings, ModelSettings, TrainSettings

__all__ = [
    "RECIPES_DIR",
    "BudgetSettings",
    "Configuration",
    "DataSettings",
    "DatasetSpec",
    "EvalPrompt",
    "EvaluateSettings",
    "FinishSettings",
    "KeepSettings",
    "LoraSettings",
    "ModelSettings",
    "PublishSettings",
    "Secrets",
    "Settings",
    "TrainSettings",
    "Where",
    "data_fingerprint",
    "data_identity",
    "data_suffixes",
    "default_run_id",
    "distinct_labels",
    "is_hub_id",
    "known_names",
    "package_file",
    "read_settings",
    "read_store",
    "result_fingerprint",
]
