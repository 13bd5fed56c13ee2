"""Small copies in the official layouts of CIFAR-100 and FGVC-Aircraft, as torchvision unpacks them."""
import pickle
from pathlib import Path

import numpy as np

from layouts_fine import jpeg, lines

SUPERS = {"fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
          "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
          "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree")}
# names with a slash, blanks and a part that is another name; a family of one variant
AIRCRAFT = {"737-200": ("Boeing 737", "Boeing"), "737-300": ("Boeing 737", "Boeing"),
            "737-400": ("Boeing 737", "Boeing"), "737-500": ("Boeing 737", "Boeing"),
            "A318": ("A320", "Airbus"), "A319": ("A320", "Airbus"), "A320": ("A320", "Airbus"),
            "A321": ("A320", "Airbus"), "A340-200": ("A340", "Airbus"), "A340-300": ("A340", "Airbus"),
            "F/A-18": ("F/A-18", "McDonnell Douglas"), "DC-9-30": ("DC-9", "McDonnell Douglas"),
            "747-100": ("Boeing 747", "Boeing"), "747-200": ("Boeing 747", "Boeing"),
            "747-300": ("Boeing 747", "Boeing"), "747-400": ("Boeing 747", "Boeing"),
            "A340-500": ("A340", "Airbus"), "A340-600": ("A340", "Airbus"),
            "Cessna 172": ("Cessna 172", "Cessna"), "Cessna 208": ("Cessna 208", "Cessna"),
            "Spitfire": ("Spitfire", "Supermarine"), "Eurofighter Typhoon": ("Eurofighter Typhoon", "Eurofighter")}
AIRCRAFT_FILES = {"variant": "variants.txt", "family": "families.txt", "manufacturer": "manufacturers.txt"}


def cifar_names(): return sorted(c for own in SUPERS.values() for c in own)


def cifar_part(each, seed):
    "What a pickle of CIFAR-100 holds: rows of 3,072 values, red first; numbers; names of files."
    fine, rng = cifar_names(), np.random.default_rng(seed)
    parent = {c: i for i, own in enumerate(SUPERS.values()) for c in own}
    # classes mixed, as in the official files
    numbers = rng.permutation(np.repeat(np.arange(len(fine)), each)).tolist()
    return dict(data=rng.integers(0, 255, (len(numbers), 3072), dtype=np.uint8), fine_labels=numbers,
                coarse_labels=[parent[fine[n]] for n in numbers], batch_label="toy",
                filenames=[f"{fine[n]}_s_{seed}{i:05d}.png" for i, n in enumerate(numbers)])


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


def make_cifar100(root, each=4):
    "cifar-100-python/: `meta`, `train` and `test`; 15 classes of 3 superclasses; gives the folder."
    root = Path(root) / "cifar-100-python"
    save(root / "meta", dict(fine_label_names=cifar_names(), coarse_label_names=list(SUPERS)))
    save(root / "train", cifar_part(each, 0))
    save(root / "test", cifar_part(2, 1))
    return root


def make_aircraft(root, each=4):
    "fgvc-aircraft-2013b/data/: images with numbers of seven digits, a list per level and part; gives the folder."
    root = Path(root) / "fgvc-aircraft-2013b" / "data"
    rows = [(f"{(i * 7 + k * 1013) % 10_000_000:07d}", name, "test" if k == 0 else "trainval")
            for i, name in enumerate(AIRCRAFT, 1) for k in range(each)]
    for i, (number, _, _) in enumerate(rows): jpeg(root / "images" / f"{number}.jpg", i, size=(48, 60))
    for part in ("trainval", "test"):
        own = [(number, name) for number, name, p in rows if p == part]
        labels = {"variant": lambda n: n, "family": lambda n: AIRCRAFT[n][0], "manufacturer": lambda n: AIRCRAFT[n][1]}
        for level, of in labels.items():
            lines(root / f"images_{level}_{part}.txt", [f"{number} {of(name)}" for number, name in own])
            lines(root / AIRCRAFT_FILES[level], sorted({of(name) for name in AIRCRAFT}))
    return root
