"""Layers that know nothing of tasks' meaning: attention, row mixing, tokens, stacks of networks, gated experts,
branches and trunks of operator networks, layers on grids."""

from mtjax.nn.attention import (
    FeedForward,
    MultiHeadAttention,
    TransformerLayer,
    attend,
    in_row_chunks,
    multitask_mask,
    readable_tokens,
)
from mtjax.nn.embeddings import FlatImage, PeriodicEmbedding, RandomFourierFeatures
from mtjax.nn.expert_use import ExpertUse, ablation_utility, linear_cka
from mtjax.nn.experts import ExpertLayout, GatedExperts, GatedOutput, masked_softmax
from mtjax.nn.grid_layers import ConvBlock, SpectralConv
from mtjax.nn.operator_layers import CNN, MLP, FixedNorm, ModifiedMLP, ResidualMLP, StackedBranch
from mtjax.nn.output_transforms import apply_mask, hard_boundary, standardised
from mtjax.nn.row_mixing import RowMixing, TokenMixer, context_mask
from mtjax.nn.stacked import StackedDense, StackedLayerNorm, StackedMLP, TaskHeads
from mtjax.nn.tokenizer import FeatureTokenizer

__all__ = [
    "CNN",
    "ConvBlock",
    "ExpertLayout",
    "ExpertUse",
    "FeatureTokenizer",
    "FeedForward",
    "FixedNorm",
    "FlatImage",
    "GatedExperts",
    "GatedOutput",
    "MLP",
    "ModifiedMLP",
    "MultiHeadAttention",
    "PeriodicEmbedding",
    "RandomFourierFeatures",
    "ResidualMLP",
    "RowMixing",
    "SpectralConv",
    "StackedBranch",
    "StackedDense",
    "StackedLayerNorm",
    "StackedMLP",
    "TaskHeads",
    "TokenMixer",
    "TransformerLayer",
    "ablation_utility",
    "apply_mask",
    "attend",
    "context_mask",
    "hard_boundary",
    "in_row_chunks",
    "linear_cka",
    "masked_softmax",
    "multitask_mask",
    "readable_tokens",
    "standardised",
]
