"""The schema of `params.yaml`: every key, its type and range. The whole file is checked before anything runs."""

from __future__ import annotations

import re
import reprlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
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

from flatmin import reporting
from flatmin.backbones import BACKBONES
from flatmin.reporting import InputError
from flatmin.sam import METHODS, MethodSetting, Settings, method_settings

_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


def _number(value: Any) -> Any:
    """YAML 1.1, which PyYAML reads, takes `1e-05` for text; DVC writes just that for `-S x=0.00001`."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


class _WrongError(ValueError):
    """What a section's fields, each good in itself, are together: the key is relative to the section's."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def _different(names: list[str]) -> list[str]:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ValueError(f"names that differ, received {name!r} twice")
    return names


def _either(expected: str) -> Discriminator:
    """Tell a union's branches, tagged `int`, `str` or `dict`, by the value's type, so that one of them explains."""
    return Discriminator(lambda value: type(value).__name__, "either", expected)


def _backbone(name: str) -> str:
    if name not in BACKBONES:
        raise ValueError(f"one of {', '.join(BACKBONES)}")
    return name


Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[Float, Field(gt=0)]
NonNegative = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
BackboneName = Annotated[str, BeforeValidator(lambda value: _backbone(value) if isinstance(value, str) else value)]
ImageSize = Annotated[int, Field(ge=8, le=4096)]
Text = Annotated[str, Field(min_length=1)]
ImageSizes = Annotated[
    Annotated[ImageSize, Tag("int")] | Annotated[dict[BackboneName, ImageSize], Tag("dict")],
    _either("an integer, or a mapping from backbones to integers"),
]
Index = Annotated[int, Field(ge=0)]
Cut = Annotated[
    Annotated[Index, Tag("int")] | Annotated[Text, Tag("str")],
    _either("a layer's index or name"),
]
Cuts = Annotated[
    Annotated[Index, Tag("int")] | Annotated[Text, Tag("str")] | Annotated[dict[BackboneName, Cut], Tag("dict")],
    _either("a layer's index or name, or a mapping from backbones to these"),
]


class Section(BaseModel):
    """A part of the file: unknown keys are refused, and nothing is converted but text that is a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Runtime(Section):
    """How the numbers are computed.

    precision: Keras' dtype policy. math: what convolutions and matrix products of float32 tensors multiply in; with
    `half` and `half_tail` TensorFlow rounds their inputs to bfloat16, 8 bits of mantissa, and adds up in float32, on a
    CPU with AMX or AVX512_BF16; with `half` LiteRT runs frozen layers in float16 on one with AVX512_FP16 or Arm's like.
    Others compute in float32, and so does evaluate. strategy: `one` device, `mirrored` over all of the machine's GPUs,
    `multi_worker` over the machines that TF_CONFIG names, or `auto`, which is `mirrored` where there are several GPUs.
    trunk: what runs the frozen layers where views are kept, `tensorflow`, `litert`, or `auto`, which is `litert` on CPU
    where it gives the same.
    """

    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = "float32"
    math: Literal["float32", "half_tail", "half"] = "float32"
    deterministic: bool = True
    strategy: Literal["auto", "one", "mirrored", "multi_worker"] = "auto"
    trunk: Literal["auto", "tensorflow", "litert"] = "auto"

    @model_validator(mode="after")
    def _litert_has_one_precision(self) -> Self:
        if self.trunk == "litert" and self.precision != "float32":
            raise _WrongError("trunk", f"auto or tensorflow with precision {self.precision}, received litert")
        return self


class Splits(Section):
    """Which split expression of the source, such as `train[:90%]`, plays which role."""

    train: Text
    test: Text
    val: Text | None = None
    predict: Text | None = None


class Data(Section):
    """Where the images come from.

    source: `bundled` (an installed package's data set: `digits`), `tfds` (a builder's name) or `folder` (a path).
    val_fraction, val_per_class: carve val out of train instead of naming a split for it.
    train_per_class: keep so many training images of each class (after val is carved out).
    image_size: store images enlarged or shrunk to this square, in pixels; as they came without it.
    skip_broken: so many unreadable images are left out before it is an error.
    label_noise: this share of the training images, drawn at random, gets the label of another class at random.
    """

    source: Literal["bundled", "tfds", "folder"]
    name: Text
    splits: Splits
    val_fraction: Fraction | None = None
    val_per_class: Count | None = None
    train_per_class: Count | None = None
    image_size: ImageSize | None = None
    skip_broken: Annotated[int, Field(ge=0)] = 0
    label_noise: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    class_names: Annotated[list[Text], Field(min_length=2)] | None = None

    @model_validator(mode="after")
    def _one_origin_of_val(self) -> Self:
        given = [
            key
            for key, value in (
                ("splits.val", self.splits.val),
                ("val_fraction", self.val_fraction),
                ("val_per_class", self.val_per_class),
            )
            if value is not None
        ]
        if len(given) != 1:
            received = " and ".join(given) or "none of them"
            raise ValueError(f"exactly one of splits.val, val_fraction and val_per_class, received {received}")
        return self

    @field_validator("class_names")
    @classmethod
    def _different_names(cls, names: list[str] | None) -> list[str] | None:
        return names and _different(names)


class Augment(Section):
    """How a training image is varied, at its stored resolution.

    engine: `imgaug`, `tensorflow` or `none`. n, m: RandAugment's operations per image (0 turns it off) and their
    magnitude (0 to 30). p: RandAugment's probability, drawn for each image. flip: mirror left and right with
    probability 0.5. crop: pad by so many pixels by reflection, then cut out the old size anywhere (0 turns it off).
    """

    engine: Literal["imgaug", "tensorflow", "none"] = "imgaug"
    n: Annotated[int, Field(ge=0, le=14)] = 3
    m: Annotated[int, Field(ge=0, le=30)] = 7
    p: Annotated[Float, Field(gt=0, le=1)] = 1.0
    flip: bool = False
    crop: Annotated[int, Field(ge=0)] = 0


class Plateau(Section):
    """Multiply the learning rate by `factor` after `patience` epochs without a val loss lower by `min_delta`."""

    name: Literal["plateau"]
    factor: Fraction = 0.2
    patience: Count = 3
    min_delta: NonNegative = 1e-3
    minimum: NonNegative = 1e-6


class Cosine(Section):
    """Rise linearly for `warmup_epochs`, then fall to zero along half a cosine (arXiv:1608.03983)."""

    name: Literal["cosine"]
    warmup_epochs: NonNegative = 0.0


class EarlyStopping(Section):
    """Stop after `patience` epochs without a val loss lower by `min_delta`."""

    patience: Count = 5
    min_delta: NonNegative = 1e-3


class Training(Section):
    """A recipe: what extract-train and finetune have in common.

    schedule: null keeps the learning rate. weight_decay: decoupled, times the learning rate. ema: momentum of the
    weights' exponential moving average, which is then what is validated and kept. image_size: pixels, one for all
    backbones or one for each named; without it, extract's is in the table in backbones.py, and finetune's is extract's.
    views: so many augmented views of each image are drawn, what the frozen layers make of them is kept, and epoch e
    takes view e mod views; 0 augments afresh in every epoch.
    """

    optimizer: Literal["adam", "adamw", "sgd"]
    learning_rate: Positive
    schedule: Annotated[Plateau | Cosine, Field(discriminator="name")] | None = None
    weight_decay: NonNegative = 0.0
    label_smoothing: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    ema: Fraction | None = None
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.2
    batch_size: Count
    epochs: Count
    views: Annotated[int, Field(ge=0)] = 0
    early_stopping: EarlyStopping | None = None
    image_size: ImageSizes | None = None

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Self:
        if isinstance(self.schedule, Cosine) and self.schedule.warmup_epochs >= self.epochs:
            warmup = self.schedule.warmup_epochs
            message = f"less than epochs, which is {self.epochs}, received {warmup:g}"
            raise _WrongError("schedule.warmup_epochs", message)
        return self


class Extract(Training):
    """extract-train: a classifier behind each frozen backbone.

    weights: for each backbone `imagenet` (the default), `none` (random), or a weights file. levels: the head sees what
    the backbone makes at last, or the last activations of all resolutions. hidden_units: of a ReLU layer in the head,
    or 0. finetune keeps both. augment: whether the head is trained on augmented images, or on the images as they are.
    """

    weights: dict[BackboneName, Text] = {}
    levels: Literal["last", "all"] = "last"
    hidden_units: Annotated[int, Field(ge=0)] = 0
    augment: bool = True

    @model_validator(mode="after")
    def _differing_views(self) -> Self:
        if self.views > 1 and not self.augment:
            raise _WrongError("views", f"at most 1 without augment, received {self.views}")
        return self


class Finetune(Training):
    """finetune and sam-finetune: the layers from `fine_tune_at` on, by index or by name, for one or each backbone."""

    fine_tune_at: Cuts | None = None


class Select(Section):
    """The cheapest backbone within `tolerance` (a fraction) of the best val accuracy is taken."""

    tolerance: Annotated[Float, Field(ge=0, le=1)] = 0.0


class SamSettings(Section):
    """Sharpness-aware minimization, as `flatmin.sam.Settings` explains it.

    epochs: number of epochs of sam-finetune, in place of finetune's. Half of them take as many gradient evaluations.
    The settings that belong to one method come from `flatmin.sam.METHODS`; None means the method's default.
    """

    method: str = Settings.method
    rho: NonNegative = Settings.rho
    adaptive: bool = Settings.adaptive
    every: Count = Settings.every
    num_batch_splits: Count = 1
    accumulate: Count = Settings.accumulate
    sync_perturbation: bool = Settings.sync_perturbation
    epochs: Count | None = None

    def settings(self) -> dict[str, Any]:
        """The arguments of `flatmin.sam.Settings`."""
        return self.model_dump(exclude={"epochs"})

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        method = METHODS[self.method]
        for key in method_settings():
            value = getattr(self, key)
            if value is not None and key not in method.settings:
                raise _WrongError(key, f"no value with method {self.method}, received {value:g}")
        if method.rho_range:
            low, high = (self.rho if getattr(self, key) is None else getattr(self, key) for key in method.rho_range)
            if low > high:
                key, other = method.rho_range
                raise _WrongError(key, f"at most {other}, which is {high:g}, received {low:g}")
        if self.sync_perturbation and self.num_batch_splits > 1:
            raise _WrongError("sync_perturbation", "false with num_batch_splits, received true")
        return self


def _optional_number(setting: MethodSetting) -> Any:
    """The type of a method's own setting; None means the method's default."""
    return Annotated[Float, Field(ge=0) if setting.below is None else Field(ge=0, lt=setting.below)] | None


if TYPE_CHECKING:

    class Sam(SamSettings):
        model_config = ConfigDict(extra="allow")  # mypy cannot see the fields that the table of methods adds
else:
    Sam = create_model(
        "Sam",
        __base__=SamSettings,
        __module__=__name__,
        __doc__=SamSettings.__doc__,
        method=(Literal[tuple(METHODS)], SamSettings.model_fields["method"].default),
        **{key: (_optional_number(next(iter(each.values()))), None) for key, each in method_settings().items()},
    )


class Sharpness(Section):
    """How the minima of finetune and sam are measured, on un-augmented train images; see `flatmin.sharpness`.

    images: at most so many. rho, adaptive_rho: distance of the loss rises. steps: of Lanczos for the eigenvalues, which
    keeps as many copies of the trained weights. probes: of the trace.
    """

    images: Count = 64
    rho: Positive = 0.05
    adaptive_rho: Positive = 0.5
    steps: Count = 15
    probes: Count = 6


class Evaluate(Section):
    """ece_bins: bins of the expected calibration error. resamples: of the paired bootstrap.

    mirrored: score test once more by the mean of what an image and its mirror image are predicted to be.
    """

    batch_size: Count = 128
    mirrored: bool = False
    ece_bins: Count = 15
    resamples: Count = 10_000
    sharpness: Sharpness = Sharpness()


class Params(Section):
    """All of `params.yaml`. Every section is there, if need be as `{}`, since DVC refuses a stage that misses one."""

    seed: Annotated[int, Field(ge=0, lt=2**31)]
    runtime: Runtime
    data: Data
    augment: Augment
    backbones: Annotated[list[BackboneName], Field(min_length=1)]
    extract: Extract
    select: Select
    finetune: Finetune
    sam: Sam
    evaluate: Evaluate

    @field_validator("backbones")
    @classmethod
    def _different_names(cls, names: list[str]) -> list[str]:
        return _different(names)

    @model_validator(mode="after")
    def _differing_views(self) -> Self:
        for name, recipe in (("extract", self.extract), ("finetune", self.finetune)):
            if recipe.views > 1 and self.augment.engine == "none":
                raise _WrongError(f"{name}.views", f"at most 1 with augment.engine none, received {recipe.views}")
        return self

    @model_validator(mode="after")
    def _warm_up_of_sam_ends(self) -> Self:
        schedule, epochs = self.finetune.schedule, self.sam.epochs
        if isinstance(schedule, Cosine) and epochs and schedule.warmup_epochs >= epochs:
            message = (
                f"more than finetune.schedule.warmup_epochs, which is {schedule.warmup_epochs:g}, received {epochs}"
            )
            raise _WrongError("sam.epochs", message)
        return self


def load(path: Path | str = "params.yaml") -> Params:
    """Read and check the whole file.

    Raises:
        InputError: a key is unknown, missing or there twice, a type is wrong or a value impossible, or the file is
            no YAML. The message is one line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        _refuse_twice(yaml.compose(text, yaml.SafeLoader), str(path))
        values = yaml.safe_load(text)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: expected a file, found none") from None
    except OSError as error:
        raise InputError(f"{path}: expected a file that can be read, received: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        raise InputError(f"{path}: expected YAML, received {_explain_yaml(error)}") from None
    except Exception as error:  # PyYAML lets through what int(), dates and the like raise
        raise InputError(f"{path}: expected YAML, received {' '.join(str(error).split())}") from None
    return parse(values, str(path))


def _refuse_twice(document: yaml.Node | None, where: str) -> None:
    """A key that is there twice is an error, which YAML says and PyYAML does not."""
    pending: list[tuple[str, yaml.Node | None]] = [("", document)]
    seen: set[int] = set()
    while pending:
        prefix, node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += [(f"{prefix}{index}.", item) for index, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                name = str(key.value)
                if name in keys:
                    line = key.start_mark.line + 1
                    raise InputError(f"{where}: {prefix}{_one_line(name)}: expected once, received twice (line {line})")
                keys.add(name)
                pending.append((f"{prefix}{_one_line(name)}.", value))


def _explain_yaml(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return " ".join(f"{error.context or ''} {error.problem or ''}".split()) + place


def parse(values: Any, where: str = "params.yaml") -> Params:
    """Check values as `load` does; `where` names them in the message."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{where}: {_explain(error, values)}") from None


def _explain(findings: ValidationError, values: Any) -> str:
    """The first finding, as 'key: expected ..., received ...'."""
    finding = findings.errors(include_url=False)[0]
    kind, context = finding["type"], finding.get("ctx", {})
    key = _key(finding["loc"], values, kind == "missing")
    received = _shorten(finding["input"])
    match kind:
        case "missing":
            return f"{key}: expected a value, found none"
        case "union_tag_not_found":
            return f"{key}.name: expected a value, found none"
        case "union_tag_invalid":
            name = _shorten(finding["input"]["name"])
            return f"{key}.name: expected {context['expected_tags'].replace(', ', ' or ')}, received {name}"
        case "value_error":
            error = context["error"]
            if isinstance(error, _WrongError):
                key = f"{key}.{error.key}" if finding["loc"] else error.key
            return f"{key}: expected {error}" + ("" if "received" in str(error) else f", received {received}")
        case "extra_forbidden":
            expected = "no such key"
        case "invalid_key":
            expected = "a key that is text"
        case "model_type" | "model_attributes_type" | "dict_type":
            expected = "a mapping"
        case "too_short":
            expected = f"a list of at least {context['min_length']}"
        case "string_too_short":
            expected = "text that isn't empty"
        case "string_unicode":
            expected = "text"
        case _:
            expected = re.sub(r"^.*?should be ", "", finding["msg"])
            expected = expected[:1].lower() + expected[1:]
    return f"{key}: expected {expected}, received {received}"


def _key(location: tuple[int | str, ...], values: Any, missing: bool) -> str:
    """`('finetune', 'schedule', 'plateau', 'factor')` without the parts that name a branch of a union.

    Those are the parts that lead nowhere in `values`, as does the last part where a value is missing.
    """
    names = []
    for index, part in enumerate(location):
        children = dict(enumerate(values)) if isinstance(values, list) else values if isinstance(values, dict) else {}
        found = [child for child in children if child == part or str(child) == part]
        if found:
            values = children[found[0]]
        if found or (missing and index == len(location) - 1):
            names.append(_one_line(str(part)))
    return ".".join(names) or "the file"


def _one_line(key: str) -> str:
    return key if key.isprintable() and len(key) <= 60 else _shorten(key)


def _shorten(value: Any) -> str:
    """At most 60 characters, however large, deep or odd the value."""
    try:
        text = _repr.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60


def _main(path: str = "params.yaml") -> None:
    reporting.log(f"{path}: good, seed {load(path).seed}")


if __name__ == "__main__":
    reporting.run(_main, *sys.argv[1:])
