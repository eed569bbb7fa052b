"""RoomScenes: rendered rooms, persons and streets with dense labels, a stand-in for image sets that need a download.

    data = rooms.load(rooms.RoomsConfig())                        # rooms: segmentation, depth, normals, edge
    people = rooms.load(rooms.RoomsConfig(variant="person"))      # adds parts and saliency
    sets = rooms.heterogeneous(rooms.RoomsConfig())               # one task per set, no image in two of them
    rooms.baselines(data["train"], data["test"])                  # what a guess without the image reaches

Measured at 32 x 32 (2,048 scenes for training, 1,024 for the test): wall .40, floor .26, ceiling .16, bed .06, sofa
.04, cabinet .04, table .03, door .01, the others below .01; edges 18 % of the pixels, valid depth 98 %; 3.9 objects are
seen. Without looking at the image: segmentation mIoU .105 per pixel (.030 constant), depth RMSE .75 m (.92), normals
36.6 degrees (63.3), edge F .35 (.30).
"""

from mtjax.data.rooms.baselines import baselines
from mtjax.data.rooms.config import (
    CLASSES,
    EXTRAS,
    OBJECT_CLASSES,
    PARTS,
    PERSON_CLASSES,
    ROOM_CLASSES,
    STREET_CLASSES,
    STUFF,
    TASKS,
    THINGS,
    RoomsConfig,
    Style,
)
from mtjax.data.rooms.dataset import HETEROGENEOUS, generate, heterogeneous, load, to_records
from mtjax.data.rooms.labels import boxes, panoptic

__all__ = [
    "CLASSES",
    "EXTRAS",
    "HETEROGENEOUS",
    "OBJECT_CLASSES",
    "PARTS",
    "PERSON_CLASSES",
    "ROOM_CLASSES",
    "STREET_CLASSES",
    "STUFF",
    "TASKS",
    "THINGS",
    "RoomsConfig",
    "Style",
    "baselines",
    "boxes",
    "generate",
    "heterogeneous",
    "load",
    "panoptic",
    "to_records",
]
