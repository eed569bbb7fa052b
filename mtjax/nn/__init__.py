"""Layers that know nothing of tasks' meaning: attention, row mixing, tokens, stacks of networks, gated experts,
branches and trunks of operator networks, layers on grids, sparse mixtures of experts and their routers, vision
transformers and decoders."""

from mtjax.nn.attention import (
    FeedForward,
    MultiHeadAttention,
    TransformerLayer,
    attend,
    in_row_chunks,
    multitask_mask,
    readable_tokens,
)
from mtjax.nn.balance import RouterStats
from mtjax.nn.context_gate import ContextGate
from mtjax.nn.decoders import PUP, ConvHead, HeatmapHead, LinearUnpatch
from mtjax.nn.embeddings import FlatImage, PeriodicEmbedding, RandomFourierFeatures
from mtjax.nn.expert_surgery import grow_experts, prune_to_task
from mtjax.nn.expert_use import ExpertUse, ablation_utility, linear_cka
from mtjax.nn.experts import ExpertLayout, GatedExperts, GatedOutput, masked_softmax
from mtjax.nn.grid_layers import ConvBlock, SpectralConv
from mtjax.nn.moe import Dispatch, moe_apply, route_tokens
from mtjax.nn.moe_attention import MoEAttention
from mtjax.nn.moe_layer import MoEMlp
from mtjax.nn.moe_parallel import moe_apply_parallel
from mtjax.nn.operator_layers import CNN, MLP, FixedNorm, ModifiedMLP, ResidualMLP, StackedBranch
from mtjax.nn.output_transforms import apply_mask, hard_boundary, standardised
from mtjax.nn.routers import Router, RouterConfig
from mtjax.nn.row_mixing import RowMixing, TokenMixer, context_mask
from mtjax.nn.stacked import StackedDense, StackedLayerNorm, StackedMLP, TaskHeads
from mtjax.nn.tokenizer import FeatureTokenizer
from mtjax.nn.vit import ViT, ViTConfig

__all__ = [
    "CNN",
    "ContextGate",
    "ConvBlock",
    "ConvHead",
    "Dispatch",
    "ExpertLayout",
    "ExpertUse",
    "FeatureTokenizer",
    "FeedForward",
    "FixedNorm",
    "FlatImage",
    "GatedExperts",
    "GatedOutput",
    "HeatmapHead",
    "LinearUnpatch",
    "MLP",
    "MoEAttention",
    "MoEMlp",
    "ModifiedMLP",
    "MultiHeadAttention",
    "PUP",
    "PeriodicEmbedding",
    "RandomFourierFeatures",
    "ResidualMLP",
    "Router",
    "RouterConfig",
    "RouterStats",
    "RowMixing",
    "SpectralConv",
    "StackedBranch",
    "StackedDense",
    "StackedLayerNorm",
    "StackedMLP",
    "TaskHeads",
    "TokenMixer",
    "TransformerLayer",
    "ViT",
    "ViTConfig",
    "ablation_utility",
    "apply_mask",
    "attend",
    "context_mask",
    "grow_experts",
    "hard_boundary",
    "in_row_chunks",
    "linear_cka",
    "masked_softmax",
    "moe_apply",
    "moe_apply_parallel",
    "multitask_mask",
    "prune_to_task",
    "readable_tokens",
    "route_tokens",
    "standardised",
]
