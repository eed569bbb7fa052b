"""Models, one file per published architecture: Linen modules `(batch, *, task=None, train=False) -> outputs`."""

from mtjax.models.aitm import AITM, calibrator
from mtjax.models.deeponet import DeepONet, predict_at
from mtjax.models.esmm import ESMM
from mtjax.models.fno import FNO
from mtjax.models.ft_transformer import FTTransformer, single_task_ft_transformer
from mtjax.models.gated_experts import GatedExpertModel, Wiring
from mtjax.models.mionet import mionet
from mtjax.models.mlp_baselines import adatt, cgc, mmoe, omoe, ple, shared_bottom, single_task, stem
from mtjax.models.mt_deeponet import darcy_deeponet, fisher_deeponet, heat3d_deeponet, small_deeponet
from mtjax.models.multitab import MultiTabNet
from mtjax.models.pod_deeponet import PODDeepONet, pod_basis
from mtjax.models.saint import Saint, single_task_saint
from mtjax.models.separable_deeponet import SeparableDeepONet
from mtjax.models.single_task_model import SingleTaskModel
from mtjax.models.tab_transformer import TabTransformer, single_task_tab_transformer
from mtjax.models.unet import UNet

__all__ = [
    "AITM",
    "DeepONet",
    "ESMM",
    "FNO",
    "FTTransformer",
    "GatedExpertModel",
    "MultiTabNet",
    "PODDeepONet",
    "Saint",
    "SeparableDeepONet",
    "SingleTaskModel",
    "TabTransformer",
    "UNet",
    "Wiring",
    "adatt",
    "calibrator",
    "cgc",
    "darcy_deeponet",
    "fisher_deeponet",
    "heat3d_deeponet",
    "mionet",
    "mmoe",
    "omoe",
    "ple",
    "pod_basis",
    "predict_at",
    "shared_bottom",
    "single_task",
    "single_task_ft_transformer",
    "single_task_saint",
    "single_task_tab_transformer",
    "small_deeponet",
    "stem",
]
