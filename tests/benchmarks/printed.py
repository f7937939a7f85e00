"""The tables of the IEC paper as printed, to hold the recipes against."""

# Uncorrected and corrected FID as printed, dataset by dataset; the first is the float model's alone.
PRINTED: dict[tuple[int, str], list[str]] = {
    (1, "cifar10"): ["4.19", "w8a8 4.32 3.76", "w4a8 6.82 5.96"],
    (1, "churches"): ["3.99", "w8a8 3.57 3.29", "w4a8 6.27 6.10"],
    (1, "bedrooms"): ["3.37", "w8a8 8.97 7.78"],
    (2, "cifar10"): [
        "4.19",
        "deepcache-3 4.70 3.96",
        "deepcache-5 5.73 4.83",
        "deepcache-10 9.74 7.77",
        "deepcache-15 17.21 14.58",
    ],
    (2, "churches"): [
        "3.99",
        "deepcache-3 5.10 4.73",
        "deepcache-5 6.74 6.00",
        "deepcache-10 14.81 13.17",
        "deepcache-15 25.27 22.42",
    ],
    (2, "bedrooms"): [
        "3.37",
        "deepcache-2 11.21 7.99",
        "deepcache-3 11.86 8.16",
        "deepcache-5 14.28 9.20",
        "deepcache-10 26.09 16.91",
    ],
    (3, "cifar10"): [
        "4.19",
        "w8a8-cachequant-3 4.61 3.93",
        "w8a8-cachequant-5 5.28 5.09",
        "w8a8-cachequant-10 8.19 6.47",
        "w8a8-cachequant-15 13.42 10.77",
        "w4a8-cachequant-3 7.27 6.42",
        "w4a8-cachequant-5 8.15 6.90",
        "w4a8-cachequant-10 11.36 10.69",
        "w4a8-cachequant-15 16.76 15.50",
    ],
    (3, "churches"): [
        "3.99",
        "w8a8-cachequant-3 3.66 3.39",
        "w8a8-cachequant-5 3.71 3.24",
        "w8a8-cachequant-10 5.54 4.25",
        "w8a8-cachequant-15 9.47 6.90",
        "w4a8-cachequant-3 7.08 6.85",
        "w4a8-cachequant-5 7.24 6.79",
        "w4a8-cachequant-10 10.75 9.69",
        "w4a8-cachequant-15 13.28 11.50",
    ],
    (3, "bedrooms"): [
        "3.37",
        "w8a8-cachequant-2 8.85 7.51",
        "w8a8-cachequant-3 9.27 7.33",
        "w8a8-cachequant-5 10.29 7.67",
        "w8a8-cachequant-10 17.53 11.07",
    ],
    (4, "imagenet"): [
        "3.37",
        "w8a8-cachequant-10 4.68 4.15",
        "w8a8-cachequant-15 5.51 5.18",
        "w8a8-cachequant-20 7.21 6.53",
        "w4a8-cachequant-10 6.90 6.50",
        "w4a8-cachequant-15 9.40 8.66",
        "w4a8-cachequant-20 12.65 11.10",
    ],
    (4, "coco"): [
        "22.41",
        "w8a8-cachequant-10 23.65 23.36",
        "w8a8-cachequant-5 23.74 22.83",
        "w4a8-cachequant-10 26.63 24.82",
        "w4a8-cachequant-5 23.85 23.80",
    ],
}
# Table 5: FID and overhead at all steps, ±1/4, ±1/8, ±1/10 and ±1/20.
PLACES = ("all", "1-4", "1-8", "1-10", "1-20")
ABLATION = {
    "w8a8": ("3.76 100%", "3.85 50%", "3.86 25%", "3.88 20%", "3.97 10%"),
    "deepcache-10": ("7.77 14%", "7.92 7%", "9.31 4.2%", "9.58 2.8%", "9.55 1.4%"),
}


def expected() -> dict[tuple[int, str], str]:
    """Return FID by table and name of the row."""
    found: dict[tuple[int, str], str] = {}
    for (table, dataset), (alone, *pairs) in PRINTED.items():
        found[table, f"{dataset}-float"] = alone
        for pair in pairs:
            name, plain, corrected = pair.split()
            found[table, f"{dataset}-{name}"] = plain
            found[table, f"{dataset}-{name}-iec"] = corrected
    for recipe, cells in ABLATION.items():
        found |= {(5, f"cifar10-{recipe}-float"): "4.19", (5, f"cifar10-{recipe}"): _plain(recipe)}
        for place, cell in zip(PLACES, cells, strict=True):
            found[5, f"cifar10-{recipe}-iec-{place}"] = cell.split()[0]
    return found


def _plain(recipe: str) -> str:
    return {"w8a8": "4.32", "deepcache-10": "9.74"}[recipe]
