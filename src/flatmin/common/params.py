"""The schema of `params.yaml`: every key with its type, range, default and explanation.

The whole file is checked before anything runs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from flatmin.common.errors import InputError
from flatmin.common.params_errors import InconsistentError, explain, read_yaml, shorten
from flatmin.images import LARGEST, MAX_PIXELS, Fit
from flatmin.models.registry import BACKBONES
from flatmin.sam.methods import METHODS, MethodSetting, method_settings
from flatmin.sam.settings import Settings

ROLES = ("train", "val", "test", "predict")


def _refuse_repeated(items: list[Any]) -> list[Any]:
    for index, item in enumerate(items):
        if item in items[:index]:
            raise ValueError(f"distinct {'names' if isinstance(item, str) else 'numbers'}, received {item!r} twice")
    return items


def _by_type(expected: str) -> Discriminator:
    """Choose a union's branch, tagged `int`, `str` or `dict`, by the value's type, so that only it reports errors."""
    return Discriminator(lambda value: type(value).__name__, "by_type", expected)


def _refuse_unknown_backbone(name: Any) -> Any:
    if isinstance(name, str) and name not in BACKBONES:
        raise ValueError(f"one of {', '.join(BACKBONES)}")
    return name


Float = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[Float, Field(gt=0)]
NonNegative = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(gt=0, lt=1)]
Rate = Annotated[Float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
BackboneName = Annotated[str, BeforeValidator(_refuse_unknown_backbone)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
ImageSize = Annotated[int, Field(ge=8, le=4096)]
ImageSizes = Annotated[
    Annotated[ImageSize, Tag("int")] | Annotated[dict[BackboneName, ImageSize], Tag("dict")],
    _by_type("an integer, or a mapping from backbones to integers"),
]
SplitPoint = Annotated[
    Annotated[CountOrZero, Tag("int")] | Annotated[Text, Tag("str")],
    _by_type("a layer's index or name"),
]
SplitPoints = Annotated[
    Annotated[CountOrZero, Tag("int")]
    | Annotated[Text, Tag("str")]
    | Annotated[dict[BackboneName, SplitPoint], Tag("dict")],
    _by_type("a layer's index or name, or a mapping from backbones to these"),
]


class Section(BaseModel):
    """A part of the file. Unknown keys are refused, and no value is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Runtime(Section):
    """How the numbers are computed."""

    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = Field(
        "float32", description="Keras' dtype policy."
    )
    matmul: Literal["float32", "bfloat16", "half"] = Field(
        "float32",
        description="Precision in which convolutions and matrix products of float32 tensors multiply. `bfloat16`: on a"
        " CPU with AMX or AVX512_BF16, TensorFlow rounds their inputs to bfloat16 (8 bits of mantissa) and accumulates"
        " in float32. `half`: the same, and on a CPU with AVX512_FP16 or Arm's equivalent LiteRT runs the frozen layers"
        " in float16. Other processors compute in float32, and so does evaluate everywhere.",
    )
    deterministic: bool = Field(
        True, description="Use deterministic operations only, so that running again gives the same bytes."
    )
    strategy: Literal["auto", "one", "mirrored", "multi_worker"] = Field(
        "auto",
        description="Devices to train on: `one` device, `mirrored` over all GPUs of the machine, `multi_worker` over"
        " the machines that TF_CONFIG names, or `auto`: `mirrored` on a machine with several GPUs, else `one`.",
    )
    engine: Literal["auto", "tensorflow", "litert"] = Field(
        "auto",
        description="What runs the frozen layers when their activations are cached: `tensorflow`, `litert`, or `auto`:"
        " `litert` on a CPU if it gives the same activations, else `tensorflow`.",
    )

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.engine == "litert" and self.precision != "float32":
            raise InconsistentError("engine", f"auto or tensorflow with precision {self.precision}, received litert")
        return self


class Splits(Section):
    """The split expression of the source, such as `train[:90%]`, for each role."""

    train: Text = Field(description="Examples to train on.")
    test: Text | None = Field(
        description="Examples on which evaluate scores the models; nothing is decided by them. Null with `folds`, and"
        " only then."
    )
    val: Text | None = Field(
        None,
        description="Examples that decide epochs, backbone and settings. Null: taken out of train, see `val_fraction`.",
    )
    predict: Text | None = Field(None, description="Examples to predict, whose labels are ignored. Null: none.")
    unused: Text | None = Field(
        None,
        description="Examples that are left out on purpose. Splits of a folder or table which no key names are an"
        " error.",
    )


class Columns(Section):
    """Where a table or a TFDS data set holds what. Null: a table's column of the key's own name; TFDS's choice."""

    image: Text | None = Field(None, description="The images: a table's paths, relative to the table.")
    label: Text | None = Field(None, description="The class names. Empty in a table: the class is not known.")
    split: Text | None = Field(
        None,
        description="The names of the splits, of a table only. Without the column: `train`, `predict` if no label.",
    )


Links = Literal["refuse", "within", "follow"]


class Data(Section):
    """The images and their roles."""

    source: Literal["bundled", "tfds", "folder", "table"] = Field(
        description="`bundled` (a data set in an installed package), `tfds` (TensorFlow Datasets), `folder` or `table`"
        " (a CSV or Parquet file with paths and labels)."
    )
    name: Text = Field(
        description="`digits` for `bundled`, the builder's name for `tfds`, a path for `folder` and `table`."
    )
    seed: Seed = Field(
        42, description="Draws val, the images that `train_per_class` keeps, and wrong labels: 0 to 2**31 - 1."
    )
    splits: Splits | None = Field(
        None,
        description="The examples of each role. Null: the source's `train`, `val` (or `valid`, `validation`), `test`"
        " and `predict`; `val` only without `val_fraction` and `val_per_class`.",
    )
    columns: Columns = Columns()
    group: Text | None = Field(
        None,
        description="Keeps images of one person, place or camera in one role. A table's column, a feature of TFDS, or"
        " for a folder a regular expression that finds the group in the path (its first bracket, or all of it). Slices"
        " in percent and `val_fraction` then take whole groups. Null: unknown.",
    )
    links: Links = Field(
        "within",
        description="Symbolic links of a folder or table: `refuse` them, read those to files `within` the folder or in"
        " DVC's cache, or `follow` all.",
    )
    folds: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="Number of folds of a cross-validation. Train's split is divided into as many parts, with classes"
        " in proportion, and by whole groups with `group`. One of them, `fold`, is test, and `splits.test` is null.",
    )
    fold: CountOrZero | None = Field(
        None, description="The fold that is test, from 0 on. The others are train, out of which val is taken."
    )
    val_fraction: Fraction | None = Field(
        None,
        description="Fraction of each class of train, in (0, 1), that becomes val, at least one image. Exactly one of"
        " `splits.val`, `val_fraction` and `val_per_class` must be given, or none of them without `splits`.",
    )
    val_per_class: Count | None = Field(
        None, description="Number of images of each class of train that become val; see `val_fraction`."
    )
    train_per_class: Count | None = Field(
        None, description="Number of images of each class to keep in train, after val was taken out. Null: all."
    )
    image_size: Annotated[
        Annotated[Literal["auto", "original"], Tag("str")] | Annotated[ImageSize, Tag("int")],
        _by_type("auto, original or an integer"),
    ] = Field(
        "auto",
        description="Length in pixels, 8 to 4096, of an image's shorter side as it is stored. The proportions stay."
        " `auto`: the largest `image_size` of extract and finetune over the backbones, but no image is enlarged."
        " `original`: stored in their own size.",
    )
    fit: Fit = Field(
        "squash",
        description="How an image becomes the network's square: `squash` changes the proportions, `crop` takes the"
        " largest square in the middle, `pad` adds grey borders.",
    )
    max_pixels: Annotated[int, Field(ge=1, le=LARGEST)] = Field(
        MAX_PIXELS, description="Pixels of the largest image that is read. A larger one counts as broken."
    )
    skip_broken: CountOrZero = Field(0, description="Maximum number of unreadable images to skip; more are an error.")
    label_noise: Rate = Field(
        0.0,
        description="Fraction of the training images, in [0, 1), drawn at random, that get the label of another class"
        " drawn at random. The records keep the true label.",
    )
    shuffle_labels: bool = Field(
        False,
        description="Permute the labels among the training images, and among those of val: a negative control, whose"
        " test accuracy is chance.",
    )
    class_names: Annotated[list[Text], Field(min_length=2)] | None = Field(
        None, description="Names of the classes in the order of their labels. Null: the source's."
    )

    @model_validator(mode="after")
    def _check_folds(self) -> Self:
        if self.folds is None:
            if self.fold is not None:
                raise InconsistentError("fold", f"null without folds, received {self.fold}")
            if self.splits and self.splits.test is None:
                raise InconsistentError("splits.test", "a value without folds, received null")
            return self
        if self.fold is None or self.fold >= self.folds:
            raise InconsistentError("fold", f"a number below folds, which is {self.folds}, received {self.fold}")
        if self.splits is None:
            raise InconsistentError("splits", "a value with folds, received null")
        if self.splits.test is not None:
            raise InconsistentError("splits.test", f"null with folds, received {shorten(self.splits.test)}")
        return self

    @model_validator(mode="after")
    def _check_val(self) -> Self:
        values = {
            "splits.val": self.splits and self.splits.val,
            "val_fraction": self.val_fraction,
            "val_per_class": self.val_per_class,
        }
        given = [key for key, value in values.items() if value is not None]
        if len(given) > 1 or (self.splits and not given):
            received = " and ".join(given) or "none of them"
            raise ValueError(f"exactly one of splits.val, val_fraction and val_per_class, received {received}")
        return self

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if self.shuffle_labels and self.label_noise:
            raise InconsistentError("label_noise", f"0 with shuffle_labels, received {self.label_noise:g}")
        return self

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        used = {"table": ("image", "label", "split"), "tfds": ("image", "label")}.get(self.source, ())
        for key, value in self.columns:
            if value is not None and key not in used:
                raise InconsistentError(f"columns.{key}", f"null with source {self.source}, received {shorten(value)}")
        return self

    @model_validator(mode="after")
    def _check_group(self) -> Self:
        if self.group is None:
            return self
        if self.source == "bundled":
            raise InconsistentError("group", f"null with source bundled, received {shorten(self.group)}")
        if self.val_per_class is not None:
            raise InconsistentError(
                "val_per_class", f"null with group, which val_fraction follows, received {self.val_per_class}"
            )
        if self.source == "folder":
            try:
                re.compile(self.group)
            except re.error as error:
                raise InconsistentError("group", f"a regular expression, received {self.group!r}: {error}") from None
        return self

    @field_validator("class_names")
    @classmethod
    def _check_class_names(cls, names: list[str] | None) -> list[str] | None:
        return names and _refuse_repeated(names)


class Augment(Section):
    """How a training image is augmented, at its stored size."""

    engine: Literal["imgaug", "tensorflow", "none"] = Field(
        "imgaug", description="Library that augments: `imgaug`, `tensorflow`, or `none` for no augmentation."
    )
    n: Annotated[int, Field(ge=0, le=14)] = Field(
        3, description="RandAugment's number of operations per image, 0 to 14. 0 turns RandAugment off."
    )
    m: Annotated[int, Field(ge=0, le=30)] = Field(7, description="RandAugment's magnitude, 0 to 30.")
    p: Annotated[Float, Field(gt=0, le=1)] = Field(
        1.0, description="Probability, in (0, 1], with which an image gets RandAugment."
    )
    flip: bool = Field(False, description="Mirror left and right with probability 0.5.")
    crop: CountOrZero = Field(
        0,
        description="Pixels by which an image is padded on each side (by reflection) before a part of its old size is"
        " cut out at random. 0 turns it off.",
    )


class Plateau(Section):
    """A learning rate that is reduced when the val loss stops falling."""

    name: Literal["plateau"] = Field(description="`plateau`.")
    factor: Fraction = Field(0.2, description="What the learning rate is multiplied by, in (0, 1).")
    patience: Count = Field(
        3, description="Epochs without a val loss lower by `min_delta` after which the learning rate is reduced."
    )
    min_delta: NonNegative = Field(1e-3, description="Smallest decrease of the val loss that counts, in nats.")
    minimum: NonNegative = Field(1e-6, description="Lowest learning rate.")


class Cosine(Section):
    """A learning rate that rises linearly, then falls to zero along half a cosine (arXiv:1608.03983)."""

    name: Literal["cosine"] = Field(description="`cosine`.")
    warmup_epochs: NonNegative = Field(0.0, description="Epochs of the linear rise, fewer than `epochs`.")


class EarlyStopping(Section):
    """When to stop before the last epoch."""

    patience: Count = Field(5, description="Epochs without a val loss lower by `min_delta` after which training stops.")
    min_delta: NonNegative = Field(1e-3, description="Smallest decrease of the val loss that counts, in nats.")


Balance = Literal["none", "balanced"]


class Training(Section):
    """The keys that extract and finetune share."""

    optimizer: Literal["adam", "adamw", "sgd"] = Field(description="`adam`, `adamw` or `sgd` (momentum 0.9).")
    learning_rate: Positive = Field(description="Learning rate, > 0; the highest one with a schedule.")
    schedule: Annotated[Plateau | Cosine, Field(discriminator="name")] | None = Field(
        None, description="Learning-rate schedule, `plateau` or `cosine` by its `name`. Null: constant."
    )
    weight_decay: NonNegative = Field(
        0.0, description="Decoupled weight decay, >= 0; in each step it is multiplied by the learning rate."
    )
    label_smoothing: Rate = Field(0.0, description="Label smoothing, in [0, 1).")
    class_weights: Balance = Field(
        "none",
        description="`balanced`: each image's loss is divided by the size of its class, scaled to a mean weight of 1"
        " over train. `none`: every image weighs the same.",
    )
    sampling: Balance = Field(
        "none",
        description="`balanced`: an epoch draws every class equally often, and as many images as train has. Those of a"
        " rare class come several times, those of a frequent one in part. `none`: every image once.",
    )
    ema: Fraction | None = Field(
        None,
        description="Momentum, in (0, 1), of an exponential moving average of the weights, which is then validated and"
        " saved in place of the weights. Null: no average.",
    )
    dropout: Rate = Field(0.2, description="Rate of the head's dropout, in [0, 1).")
    batch_size: Count = Field(description="Images per step, over all replicas.")
    epochs: Count = Field(description="Maximum number of epochs.")
    views: CountOrZero = Field(
        0,
        description="Number of augmented views of each image whose activations are cached; epoch e takes view e mod"
        " `views`. 0 augments again in every epoch and caches nothing.",
    )
    early_stopping: EarlyStopping | None = Field(None, description="When to stop before the last epoch. Null: never.")
    image_size: ImageSizes | None = Field(
        description="Side in pixels of the network's input, 8 to 4096: one for all backbones, or a mapping from"
        " backbones to sizes. Null: for extract the backbone's default, for finetune that of extract. The key is"
        " required, because DVC refuses prepare, which depends on it, without it.",
    )

    @model_validator(mode="after")
    def _check_balance(self) -> Self:
        if self.class_weights == self.sampling == "balanced":
            raise InconsistentError("sampling", "none with class_weights balanced, received balanced")
        return self

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if isinstance(self.schedule, Cosine) and self.schedule.warmup_epochs >= self.epochs:
            warmup = self.schedule.warmup_epochs
            message = f"less than epochs, which is {self.epochs}, received {warmup:g}"
            raise InconsistentError("schedule.warmup_epochs", message)
        return self


class Extract(Training):
    """extract-train: trains a classifier head on each frozen backbone."""

    seed: Seed = Field(
        42, description="Draws the head's initial weights, its dropout, the order and the augmentation: 0 to 2**31 - 1."
    )
    weights: dict[BackboneName, Text] = Field(
        {},
        description="Initial weights by backbone: `imagenet` (the default), `none` (random) or a weights file, relative"
        " or below `$FLATMIN_WEIGHTS`.",
    )
    levels: Literal["last", "all"] = Field(
        "last",
        description="What the head sees: the backbone's `last` activations, or the last activations at `all` of its"
        " resolutions. finetune keeps it.",
    )
    hidden_units: CountOrZero = Field(
        0, description="Units of a hidden ReLU layer in the head, or 0 for none. finetune keeps it."
    )
    augment: bool = Field(True, description="Train on augmented images, or else on the images as they are stored.")

    @model_validator(mode="after")
    def _check_views(self) -> Self:
        if self.views > 1 and not self.augment:
            raise InconsistentError("views", f"at most 1 without augment, received {self.views}")
        return self


class Finetune(Training):
    """finetune, control and sam-finetune: train the layers from `fine_tune_at` on, and the head."""

    fine_tune_at: SplitPoints | None = Field(
        None,
        description="First layer of the backbone to train, by its name or its index: one for all backbones, or a"
        " mapping from backbones to layers. Null: the backbone's default.",
    )


def for_backbone(setting: Any, backbone: str) -> Any:
    """A setting that is one value for all backbones, or a mapping from backbones to values; None where it has none."""
    return setting.get(backbone) if isinstance(setting, dict) else setting


def largest_image_size(backbones: list[str], extract: ImageSizes | None, finetune: ImageSizes | None) -> int:
    """The side in pixels of the largest network input that any backbone has in any stage."""
    sizes = [for_backbone(extract, backbone) or BACKBONES[backbone].image_size for backbone in backbones]
    return max([*sizes, *(for_backbone(finetune, backbone) or 0 for backbone in backbones)])


Metric = Literal["accuracy", "balanced_accuracy"]


def loss_of(metric: Metric) -> str:
    """The loss on val that goes with a metric: `loss`, or `balanced_loss`."""
    return metric.replace("accuracy", "loss")


class Select(Section):
    """What decides on val, and which backbone is selected."""

    metric: Metric = Field(
        description="Score on val that decides the best epoch, the backbone and the released model: `accuracy`, or"
        " `balanced_accuracy`, the mean over classes. With the latter early stopping and plateaus follow the mean loss"
        " over classes, too. The key is required, because DVC refuses stages that depend on it without it."
    )
    tolerance: Annotated[Float, Field(ge=0, le=1)] = Field(
        0.0, description="Select the cheapest backbone whose score is within this fraction of the best, 0 to 1."
    )


class Audit(Section):
    """What audit reports of the data. Only the report, and evaluate's scores without near duplicates, depend on it."""

    hash_bits: Annotated[int, Field(ge=0, le=63)] = Field(
        16,
        description="Bits, of 63, in which the perceptual hashes of near duplicates may differ, mirrored or not.",
    )
    cosine: Annotated[Float, Field(gt=0, le=1)] = Field(
        0.4,
        description="Lowest cosine, in (0, 1], between the whitened activations of near duplicates with equal hashes."
        " Each bit in which the hashes differ raises it by 0.03.",
    )
    small_class: Count = Field(20, description="Classes with fewer training images than this are reported.")


class SharedSam(Section):
    """The settings of sharpness-aware steps that all methods share, as `flatmin.sam.Settings` explains them."""

    method: str = Field(Settings.method, description="A method of the table in docs/sam.md.")
    rho: NonNegative = Field(Settings.rho, description="Distance to the perturbed weights; 0 takes plain steps.")
    adaptive: bool = Field(
        Settings.adaptive,
        description="Measure rho relative to the size of each weight (ASAM). It is about ten times as large then.",
    )
    every: Count = Field(
        Settings.every, description="Perturb the first step and every `every`-th step after it. The others are plain."
    )
    num_batch_splits: Count = Field(1, description="Number of parts of a batch, each with its own perturbation.")
    accumulate: Count = Field(Settings.accumulate, description="Number of batches whose gradients make one update.")
    sync_perturbation: bool = Field(
        Settings.sync_perturbation,
        description="One perturbation from all replicas' gradients, instead of each replica's own.",
    )
    epochs: Count | None = Field(
        None,
        description="Number of epochs, instead of finetune's. Half as many take as many gradient evaluations.",
    )

    def settings(self) -> dict[str, Any]:
        """The arguments of `flatmin.sam.Settings`."""
        return self.model_dump(exclude={"epochs"})

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        method = METHODS[self.method]
        for key in method_settings():
            value = getattr(self, key)
            if value is not None and key not in method.settings:
                raise InconsistentError(key, f"no value with method {self.method}, received {value:g}")
        if method.rho_range:
            low, high = (self.rho if getattr(self, key) is None else getattr(self, key) for key in method.rho_range)
            if low > high:
                key, other = method.rho_range
                raise InconsistentError(key, f"at most {other}, which is {high:g}, received {low:g}")
        if self.sync_perturbation and self.num_batch_splits > 1:
            raise InconsistentError("sync_perturbation", "false with num_batch_splits, received true")
        return self


def _own_setting(users: dict[str, MethodSetting]) -> Any:
    """Type and default of a setting that not all methods have; None means the method's default."""
    bound = next(iter(users.values())).below
    number = Annotated[Float, Field(ge=0) if bound is None else Field(ge=0, lt=bound)]
    meanings = (f"{method}: {setting.meaning} (default {setting.default})" for method, setting in users.items())
    return number | None, Field(None, description=f"{'; '.join(meanings)}.")


if TYPE_CHECKING:

    class Sam(SharedSam):
        model_config = ConfigDict(extra="allow")  # mypy cannot see the fields that the table of methods adds
else:
    Sam = create_model(
        "Sam",
        __base__=SharedSam,
        __module__=__name__,
        __doc__="Sharpness-aware steps of sam-finetune. `null` means the method's default.",
        method=(Literal[tuple(METHODS)], SharedSam.model_fields["method"]),
        **{key: _own_setting(users) for key, users in method_settings().items()},
    )


class Sharpness(Section):
    """How the sharpness of the fine-tuned models is measured, on un-augmented train images; see `flatmin.sharpness`."""

    images: Count = Field(64, description="Maximum number of training images.")
    rho: Positive = Field(0.05, description="Radius of the loss rise, > 0.")
    adaptive_rho: Positive = Field(0.5, description="Radius of the adaptive loss rise, > 0.")
    steps: Count = Field(
        15, description="Lanczos iterations for the eigenvalues; each keeps one copy of the trained weights in memory."
    )
    probes: Count = Field(6, description="Random vectors of Hutchinson's estimate of the trace.")


class Evaluate(Section):
    """How the models are scored."""

    batch_size: Count = Field(128, description="Images per step.")
    mirrored: bool = Field(
        False, description="Also score test by the mean of the predictions for an image and its mirror image."
    )
    ece_bins: Count = Field(15, description="Bins of the expected calibration error.")
    sharpness: Sharpness = Sharpness()


class Finalize(Section):
    """Which model is released, by val alone."""

    tolerance: Annotated[Float, Field(ge=0, le=1)] = Field(
        0.005,
        description="Release the method with the fewest gradient evaluations whose mean score on val (`select.metric`)"
        " is within this fraction of the best, 0 to 1.",
    )


class Params(Section):
    """All of `params.yaml`. Every section is required, if only as `{}`: DVC refuses a stage that misses one."""

    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(
        description="Seeds of finetune, control and sam-finetune, each of which runs once for each seed. A seed draws"
        " the dropout, the order and the augmentation of a training: 0 to 2**31 - 1."
    )
    runtime: Runtime
    data: Data
    augment: Augment
    backbones: Annotated[list[BackboneName], Field(min_length=1)] = Field(
        description="Backbones that extract-train compares, at least one."
    )
    extract: Extract
    select: Select
    audit: Audit
    finetune: Finetune
    sam: Sam
    finalize: Finalize
    evaluate: Evaluate

    @model_validator(mode="before")
    @classmethod
    def _refuse_seed(cls, values: Any) -> Any:
        if isinstance(values, dict) and "seed" in values:
            expected = "seeds, a list, for finetune, control and sam-finetune, and data.seed and extract.seed"
            raise InconsistentError("seed", f"{expected} in its place, received {shorten(values['seed'])}")
        return values

    @field_validator("backbones", "seeds")
    @classmethod
    def _check_distinct(cls, items: list[Any]) -> list[Any]:
        return _refuse_repeated(items)

    @model_validator(mode="after")
    def _check_views(self) -> Self:
        for name, recipe in (("extract", self.extract), ("finetune", self.finetune)):
            if recipe.views > 1 and self.augment.engine == "none":
                raise InconsistentError(f"{name}.views", f"at most 1 with augment.engine none, received {recipe.views}")
        return self

    @model_validator(mode="after")
    def _check_sam_warmup(self) -> Self:
        schedule, epochs = self.finetune.schedule, self.sam.epochs
        if isinstance(schedule, Cosine) and epochs and schedule.warmup_epochs >= epochs:
            message = (
                f"more than finetune.schedule.warmup_epochs, which is {schedule.warmup_epochs:g}, received {epochs}"
            )
            raise InconsistentError("sam.epochs", message)
        return self


def load(path: Path | str = "params.yaml") -> Params:
    """Read and check the whole file.

    Raises:
        InputError: The file is not YAML, a key is unknown, missing or repeated, or a value has the wrong type or is
            out of range. The message is one line.
    """
    return parse(read_yaml(path), str(path))


def parse(values: Any, where: str = "params.yaml") -> Params:
    """Check values as `load` does. Messages begin with `where`."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, values)}") from None
