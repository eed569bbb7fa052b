"""Models, one file per published architecture: Linen modules `(batch, *, task=None, train=False) -> outputs`."""

from mtjax.models.aitm import AITM, calibrator
from mtjax.models.esmm import ESMM
from mtjax.models.ft_transformer import FTTransformer, single_task_ft_transformer
from mtjax.models.gated_experts import GatedExpertModel, Wiring
from mtjax.models.mlp_baselines import adatt, cgc, mmoe, omoe, ple, shared_bottom, single_task, stem
from mtjax.models.multitab import MultiTabNet
from mtjax.models.saint import Saint, single_task_saint
from mtjax.models.single_task_model import SingleTaskModel
from mtjax.models.tab_transformer import TabTransformer, single_task_tab_transformer

__all__ = [
    "AITM",
    "ESMM",
    "FTTransformer",
    "GatedExpertModel",
    "MultiTabNet",
    "Saint",
    "SingleTaskModel",
    "TabTransformer",
    "Wiring",
    "adatt",
    "calibrator",
    "cgc",
    "mmoe",
    "omoe",
    "ple",
    "shared_bottom",
    "single_task",
    "single_task_ft_transformer",
    "single_task_saint",
    "single_task_tab_transformer",
    "stem",
]
