"""Data: one source per file. Nothing here imports `nn` or `models`."""

from mtjax.data import acs_income, aliexpress, digits, flights, higgs, pde, rooms, vision
from mtjax.data.encoders import TabularEncoder
from mtjax.data.mmoe_synthetic import MMoESynthetic
from mtjax.data.multitab_bench import MultiTabBench
from mtjax.data.tabular import GivenSplit, OrderedSplit, RandomSplit, TabularDataset

__all__ = [
    "GivenSplit",
    "MMoESynthetic",
    "MultiTabBench",
    "OrderedSplit",
    "RandomSplit",
    "TabularDataset",
    "TabularEncoder",
    "acs_income",
    "aliexpress",
    "digits",
    "flights",
    "higgs",
    "pde",
    "rooms",
    "vision",
]
