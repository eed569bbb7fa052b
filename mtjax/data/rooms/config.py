"""What determines a set of rendered scenes: its variant, its size, its seed and the distributions of its appearance.

The variants and the tasks that they label (every image has all of the labels of its variant):

    rooms    NYUD-v2:         segmentation (13 classes), depth, normals, edge
    person   PASCAL-Context:  segmentation (14), parts (7), saliency, normals, edge
    street   Cityscapes:      segmentation (7), disparity
    object   ImageNet:        classification (10), one object that fills the frame
"""

import dataclasses

ROOM_CLASSES = (
    *("wall", "floor", "ceiling", "bed", "table", "chair", "sofa"),
    *("cabinet", "lamp", "bin", "picture", "door", "box"),
)
PERSON_CLASSES = (*ROOM_CLASSES, "person")
STREET_CLASSES = ("road", "sidewalk", "building", "pole", "tree", "car", "sky")
OBJECT_CLASSES = ROOM_CLASSES[3:]
PARTS = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")

CLASSES = {"rooms": ROOM_CLASSES, "person": PERSON_CLASSES, "street": STREET_CLASSES, "object": ROOM_CLASSES}
"""Names of the segmentation classes of every variant, in the order of their indices."""
STUFF = {"rooms": (0, 1, 2), "person": (0, 1, 2), "street": (0, 1, 2, 3, 4, 6), "object": (0, 1, 2)}
"""Classes without countable instances."""
THINGS = {variant: tuple(c for c in range(len(names)) if c not in STUFF[variant]) for variant, names in CLASSES.items()}
"""Classes whose pixels have an instance."""
TASKS = {
    "rooms": ("segmentation", "depth", "normals", "edge"),
    "person": ("segmentation", "parts", "saliency", "normals", "edge"),
    "street": ("segmentation", "disparity"),
    "object": ("classification",),
}
EXTRAS = ("shading", "contour", "occlusion", "texture_edge", "curvature")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """Distributions of appearance and camera; sets of different styles have a domain shift between them.

    Args:
      colour_correlation: probability that a surface has the hue of its class instead of a random one.
      textures: weights of no texture, checker, stripes and noise.
      contrast: how far a texture mixes in its second colour, 0 to 1.
      saturation: range of the saturation of surfaces.
      noise: standard deviation of the sensor noise, of a full scale of 1.
      ambient: range of the light that comes from everywhere.
      focal: range of the focal length in half widths of the image.
      height: range of the camera's height as a share of the room's.
      pitch: range of the camera's pitch in degrees, up is positive.
      yaw: largest deviation of the viewing direction from the centre of the room, degrees.
      roll: largest roll, degrees.
    """

    colour_correlation: float = 0.3
    textures: tuple[float, float, float, float] = (0.4, 0.2, 0.2, 0.2)
    contrast: float = 0.6
    saturation: tuple[float, float] = (0.1, 0.8)
    noise: float = 0.015
    ambient: tuple[float, float] = (0.2, 0.45)
    focal: tuple[float, float] = (0.7, 1.3)
    height: tuple[float, float] = (0.35, 0.75)
    pitch: tuple[float, float] = (-43.0, 14.0)
    yaw: float = 46.0
    roll: float = 9.0

    def __post_init__(self):
        if not 0 <= self.colour_correlation <= 1:
            raise ValueError(f"colour_correlation must be a probability, got {self.colour_correlation}")
        if len(self.textures) != 4 or min(self.textures) < 0 or sum(self.textures) <= 0:
            raise ValueError(f"textures needs 4 weights >= 0 that are not all 0, got {self.textures}")
        for name in ("saturation", "ambient", "focal", "height", "pitch"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}={low, high} must be a range (low, high)")
        if self.focal[0] <= 0:
            raise ValueError(f"focal lengths must be positive, got {self.focal}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoomsConfig:
    """A set of rendered scenes; equal configurations give equal arrays.

    Args:
      size: height and width of the images in pixels, or (height, width).
      train, validation, test: number of scenes of each split; an image depends on its split and index only, so that
        a larger split begins with the smaller one.
      variant: 'rooms', 'person', 'street' or 'object'.
      seed: of the whole set.
      stream: sets of one seed with different streams share no scene; `heterogeneous` gives every task its own.
      style: distributions of appearance and camera.
      supersample: rays per pixel and axis (odd); the image is their mean, labels are those of the central ray.
      label_noise: probability that an object of the training split is labelled with another object class.
      unlabelled: probability that an object of the training split has the ignored label 255 in the segmentation.
      extras: further columns of labels: 'shading' (Lambert with the light at the camera), 'contour' (instance contours
        alone), 'occlusion' (jumps of depth alone), 'texture_edge' (Sobel magnitude of the image), 'curvature' (the two
        principal curvatures in 1/m).
    """

    version = 1

    size: int | tuple[int, int] = 32
    train: int = 2048
    validation: int = 256
    test: int = 512
    variant: str = "rooms"
    seed: int = 0
    stream: int = 0
    style: Style = Style()
    supersample: int = 1
    label_noise: float = 0.0
    unlabelled: float = 0.0
    extras: tuple[str, ...] = ()

    def __post_init__(self):
        if self.variant not in CLASSES:
            raise ValueError(f"variant={self.variant!r} must be one of {', '.join(CLASSES)}")
        if min(self.shape) < 8:
            raise ValueError(f"size={self.size} is too small to show a room; expected at least 8 pixels")
        if self.supersample < 1 or self.supersample % 2 == 0:
            raise ValueError(f"supersample={self.supersample} must be odd, so that one ray meets the pixel's centre")
        if min(self.train, self.validation, self.test) < 0:
            raise ValueError(f"Splits need a number of scenes >= 0, got {self.splits}")
        if not 0 <= self.seed < 2**31 or not 0 <= self.stream < 2**31:
            raise ValueError(f"seed={self.seed} and stream={self.stream} must be from 0 to 2^31 - 1")
        if min(self.label_noise, self.unlabelled) < 0 or self.label_noise + self.unlabelled > 1:
            raise ValueError(
                f"label_noise={self.label_noise} and unlabelled={self.unlabelled} must be probabilities with a sum <= 1"
            )
        unknown = set(self.extras) - set(EXTRAS)
        if unknown:
            raise ValueError(f"extras holds {sorted(unknown)}; known are {', '.join(EXTRAS)}")

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the images."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def splits(self) -> dict[str, int]:
        """Number of scenes of every split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the segmentation classes."""
        return CLASSES[self.variant]
