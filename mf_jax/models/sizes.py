"""The sizes of the transformers, by network, name of the size, and field of the network."""

_FIELDS = ("depth", "width", "num_heads", "head_depth", "bottleneck", "positions")
_ROWS = {  # of a dit the first three
    "dit": {
        "digits": (4, 128, 2),
        "S": (12, 384, 6),
        "B": (12, 768, 12),
        "M": (16, 1024, 16),
        "L": (24, 1024, 16),
        "XL": (28, 1152, 16),
    },
    "in_context_dit": {
        "digits": (4, 128, 2, 2, 0, "sequence"),
        "B": (12, 768, 12, 8, 0, "sequence"),
        "M": (24, 768, 12, 8, 0, "sequence"),
        "L": (32, 1024, 16, 8, 0, "sequence"),
        "XL": (48, 1024, 16, 8, 0, "sequence"),
        "pixel_B": (16, 768, 12, 8, 128, "grid"),
        "pixel_L": (32, 1024, 16, 8, 128, "grid"),
        "pixel_H": (48, 1280, 16, 8, 256, "grid"),
    },
}
SIZES: dict[str, dict[str, dict[str, int | str]]] = {
    network: {size: dict(zip(_FIELDS, row, strict=False)) for size, row in rows.items()}
    for network, rows in _ROWS.items()
}
