"""Models, one file per published architecture: Linen modules `(batch, *, task=None, train=False) -> outputs`."""

from mtjax.models.aitm import AITM, calibrator
from mtjax.models.cross_stitch import CrossStitchViT
from mtjax.models.deeponet import DeepONet, predict_at
from mtjax.models.esmm import ESMM
from mtjax.models.fno import FNO
from mtjax.models.ft_transformer import FTTransformer, single_task_ft_transformer
from mtjax.models.gated_experts import GatedExpertModel, Wiring
from mtjax.models.m3vit import M3ViT, M3ViTConfig, m3vit_balance
from mtjax.models.m3vit_inference import extract_task, queue_inference
from mtjax.models.mionet import mionet
from mtjax.models.mlp_baselines import adatt, cgc, mmoe, omoe, ple, shared_bottom, single_task, stem
from mtjax.models.mod_squad import ModSquad, ModSquadConfig
from mtjax.models.mt_deeponet import darcy_deeponet, fisher_deeponet, heat3d_deeponet, small_deeponet
from mtjax.models.mtan import MTAN, MTANConfig
from mtjax.models.multitab import MultiTabNet
from mtjax.models.multitask_vit import MultitaskViT, SingleTaskViT
from mtjax.models.pad_net import PadNet, PadNetConfig
from mtjax.models.pod_deeponet import PODDeepONet, pod_basis
from mtjax.models.saint import Saint, single_task_saint
from mtjax.models.separable_deeponet import SeparableDeepONet
from mtjax.models.single_task_model import SingleTaskModel
from mtjax.models.static_decoders import StaticConfig, StaticViT
from mtjax.models.tab_transformer import TabTransformer, single_task_tab_transformer
from mtjax.models.taskexpert import TaskExpert, TaskExpertConfig
from mtjax.models.unet import UNet

__all__ = [
    "AITM",
    "CrossStitchViT",
    "DeepONet",
    "ESMM",
    "FNO",
    "FTTransformer",
    "GatedExpertModel",
    "M3ViT",
    "M3ViTConfig",
    "MTAN",
    "MTANConfig",
    "ModSquad",
    "ModSquadConfig",
    "MultiTabNet",
    "MultitaskViT",
    "PODDeepONet",
    "PadNet",
    "PadNetConfig",
    "Saint",
    "SeparableDeepONet",
    "SingleTaskModel",
    "SingleTaskViT",
    "StaticConfig",
    "StaticViT",
    "TabTransformer",
    "TaskExpert",
    "TaskExpertConfig",
    "UNet",
    "Wiring",
    "adatt",
    "calibrator",
    "cgc",
    "darcy_deeponet",
    "extract_task",
    "fisher_deeponet",
    "heat3d_deeponet",
    "m3vit_balance",
    "mionet",
    "mmoe",
    "omoe",
    "ple",
    "pod_basis",
    "predict_at",
    "queue_inference",
    "shared_bottom",
    "single_task",
    "single_task_ft_transformer",
    "single_task_saint",
    "single_task_tab_transformer",
    "small_deeponet",
    "stem",
]
