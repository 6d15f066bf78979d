"""Image processors: a new one, or a checkpoint's at another size."""

from transformers import BitImageProcessor

# ImageNet's; of gray images the mean over the colors
_MEAN, _STD = {3: [0.485, 0.456, 0.406], 1: [0.449]}, {3: [0.229, 0.224, 0.225], 1: [0.226]}


def make_processor(image_size: int, crop_ratio: float = 1.0, channels: int = 3) -> BitImageProcessor:
    """The image processor of a new model: resize the short side, crop the center, normalize to mean 0.

    Args:
        image_size: side of the crop in pixels.
        crop_ratio: `image_size` as a share of the short side before.
        channels: of the model, 3 or 1 for gray images. `pipeline` always gives 3.
    """
    if channels not in _MEAN:
        raise ValueError(f"--num_channels must be 3, or 1 for gray images, got {channels}.")
    return BitImageProcessor(
        size={"shortest_edge": round(image_size / crop_ratio)},
        crop_size={"height": image_size, "width": image_size},
        resample=2,  # bilinear
        image_mean=_MEAN[channels],
        image_std=_STD[channels],
        **({} if channels == 3 else {"do_convert_rgb": False}),
    )


def with_size(processor, image_size: int | None, crop_ratio: float | None):
    """A copy of a checkpoint's `processor` for another size or ratio; all else, and a ratio that is `None`, stays.

    Raises `ValueError` for a processor whose size is not a field of its own.
    """
    fields = processor.to_dict()
    size, crop = dict(fields.get("size") or {}), dict(fields.get("crop_size") or {})
    side = size.get("shortest_edge")
    if hasattr(processor, "val_transforms") or not size:
        raise ValueError(
            f"The size of {type(processor).__name__} can't be changed: leave --image_size and --crop_ratio out, or "
            "save a BitImageProcessor with the checkpoint."
        )
    if side and fields.get("crop_pct"):  # ConvNext's
        changes = {"size": {"shortest_edge": image_size or side}, "crop_pct": crop_ratio or fields["crop_pct"]}
    elif side and crop.get("height"):
        new = image_size or crop["height"]
        ratio = crop_ratio or crop["height"] / side
        changes = {"size": {"shortest_edge": round(new / ratio)}, "crop_size": {"height": new, "width": new}}
    elif crop_ratio is not None:
        raise ValueError(
            f"{type(processor).__name__} resizes to {size} without a crop: leave --crop_ratio out, or save a "
            "BitImageProcessor with the checkpoint."
        )
    else:
        changes = {"size": {"height": image_size, "width": image_size}}
    return type(processor).from_dict(fields | changes)
