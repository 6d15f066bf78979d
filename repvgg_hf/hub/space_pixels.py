"""What a Space's page is told of the image processor, so that it prepares pictures in the same way."""

RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # by Pillow's number
_CHANNELS = {3: "colors", 1: "gray"}


def pixel_settings(processor, channels: int) -> dict:
    """Return `resize`, `resample`, `crop`, `scale`, `mean` and `std` of an image processor, as `pixels.js` takes them.

    Args:
        processor: the image processor that the models were evaluated with.
        channels (`int`): channels of the models' input, 3 or 1.

    Raises `ValueError` naming the field for one that the page can't do.
    """
    fields, kind = processor.to_dict(), type(processor).__name__
    if channels not in _CHANNELS:
        raise ValueError(f"The models take {channels} channels, and pictures on a page have 3, or 1 as gray ones.")
    resize, crop = _resize_and_crop(fields, kind)
    resample = fields.get("resample", 2)
    if resize is not None and resample not in RESAMPLE:
        known = ", ".join(f"{number} ({name})" for number, name in RESAMPLE.items())
        raise ValueError(f"{kind}.resample is {resample}, and the page resizes by {known}: use one of these.")
    mean, std = [0.0] * channels, [1.0] * channels
    if fields.get("do_normalize"):
        mean, std = (
            _per_channel(fields, "image_mean", channels, kind),
            _per_channel(fields, "image_std", channels, kind),
        )
    return {
        "resize": resize,
        "resample": RESAMPLE.get(resample, "bilinear"),
        "crop": crop,
        "scale": fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale") else 1.0,
        "mean": mean,
        "std": std,
    }


def _resize_and_crop(fields: dict, kind: str) -> tuple[dict | None, dict | None]:
    size, resize, crop = dict(fields.get("size") or {}), None, None
    size = {name: value for name, value in size.items() if value is not None}
    if fields.get("do_resize"):
        if set(size) not in ({"shortest_edge"}, {"height", "width"}):
            raise ValueError(f"{kind}.size must have shortest_edge, or height and width, for a page; got {size}.")
        resize = size
    if fields.get("crop_pct") is not None:  # ConvNext's: a share of the resized picture, or all of it if it is large
        side = size.get("shortest_edge") if resize else None
        if side is None:
            raise ValueError(f"{kind} has crop_pct, which needs size with shortest_edge, got {size}.")
        crop = {"height": side, "width": side}
        resize = {"shortest_edge": int(side / fields["crop_pct"])} if side < 384 else crop
    elif fields.get("do_center_crop"):
        found = dict(fields.get("crop_size") or {})
        if not found.get("height") or not found.get("width"):
            raise ValueError(f"{kind}.crop_size must have height and width, got {found}.")
        crop = {"height": found["height"], "width": found["width"]}
    if crop is None and (resize is None or "shortest_edge" in resize):
        raise ValueError(f"{kind} makes pictures of different sizes: set do_center_crop=True and crop_size.")
    return resize, crop


def _per_channel(fields: dict, name: str, channels: int, kind: str) -> list[float]:
    values = fields.get(name)
    values = [values] * channels if isinstance(values, (int, float)) else list(values or [])
    if len(values) != channels:
        raise ValueError(f"{kind}.{name} has {len(values)} values, and the models take {channels} channels.")
    return values
