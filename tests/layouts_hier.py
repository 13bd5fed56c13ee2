"""Small copies in the official layouts of the hierarchical datasets: folders, names, columns, blanks, glued headers."""
import hashlib, io, json
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(seed, size=24, quality=90):
    "The bytes of a noisy JPEG whose colour depends on the seed; equal seeds give equal bytes."
    rng = np.random.default_rng(seed)
    pixels = (rng.integers(0, 180, 3) + rng.integers(0, 70, (size, size, 3))).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality)
    return out.getvalue()


def put(path, data):
    "Write bytes or text, making the folders above; lines end as given."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# ---- iNaturalist-2018: train_val2018/<supercategory>/<species id>/<md5>.jpg, split lists, COCO-style json

SPECIES = [  # supercategory, kingdom, phylum, class, order, family, genus
    ("Aves", "Animalia", "Chordata", "Aves", "Passeriformes", "Muscicapidae", "Oenanthe"),
    ("Aves", "Animalia", "Chordata", "Aves", "Passeriformes", "Muscicapidae", "Oenanthe"),
    ("Aves", "Animalia", "Chordata", "Aves", "Passeriformes", "Paridae", "Parus"),
    ("Aves", "Animalia", "Chordata", "Aves", "Anseriformes", "Anatidae", "Anas"),
    ("Insecta", "Animalia", "Arthropoda", "Insecta", "Lepidoptera", "Pieridae", "Pieris"),
    ("Insecta", "Animalia", "Arthropoda", "Insecta", "Lepidoptera", "Nymphalidae", "Vanessa"),
    ("Insecta", "Animalia", "Arthropoda", "Insecta", "Coleoptera", "Coccinellidae", "Coccinella"),
    ("Plantae", "Plantae", "Tracheophyta", "Magnoliopsida", "Apiales", "Apiaceae",
     "Oenanthe"),  # a genus name that a bird has, too
    ("Plantae", "Plantae", "Tracheophyta", "Magnoliopsida", "Fagales", "Fagaceae", "Quercus"),
    ("Plantae", "Plantae", "Tracheophyta", "Magnoliopsida", "Fagales", "Fagaceae", "Quercus"),
    ("Fungi", "Fungi", "Basidiomycota", "Agaricomycetes", "Agaricales", "Amanitaceae", "Amanita"),
    ("Fungi", "Fungi", "Basidiomycota", "Agaricomycetes", "Agaricales", "Amanitaceae", "Amanita"),
]
INAT_TEST = (1, 3, 6, 9, 11)  # positions in SPECIES
INAT_RANKS = ("kingdom", "phylum", "class", "order", "family", "genus")


def make_inat(root, images=4, first_id=995, splits="Inat_dataset_splits"):
    "iNaturalist-2018 with Smooth-AP's split files; 12 species with ids around 1,000, `images` each."
    root = Path(root)
    lines, coco = {"train": [], "test": []}, dict(info={"year": 2018}, images=[], annotations=[], licenses=[],
                                                  categories=[])
    for i, (supercategory, *ranks) in enumerate(SPECIES):
        coco["categories"].append(dict(id=first_id + i, name=f"{ranks[-1]} sp. {i}", supercategory=supercategory,
                                       **dict(zip(INAT_RANKS, ranks))))
        for j in range(images):
            name = f"train_val2018/{supercategory}/{first_id + i}/{hashlib.md5(f'{i} {j}'.encode()).hexdigest()}.jpg"
            put(root / name, jpeg([i, j]))
            lines["test" if i in INAT_TEST else "train"].append(name)
            coco["images"].append(dict(id=len(coco["images"]), file_name=name, width=24, height=24, license=0,
                                       rights_holder=""))
            coco["annotations"].append(dict(id=len(coco["annotations"]), image_id=len(coco["annotations"]),
                                            category_id=first_id + i))
    for part, names in lines.items():
        np.random.default_rng(7).shuffle(names)  # the official lists are not sorted
        put(root / splits / f"Inaturalist_{part}_set1.txt", "\n".join(names) + "\n")
    put(root / "train2018.json", json.dumps(coco))
    return root


# ---- DyML: csv files whose header line runs into the first row, and whose columns begin with a blank

def glued(header, rows):
    "The text of a DyML csv file: ', ' between fields, no line break after the header."
    return ", ".join(header) + "\n".join(", ".join(map(str, r)) for r in rows) + "\n"


def make_dyml(root, kind="vehicle", fine=16, images=4):
    "DyML-Vehicle, DyML-Animal (three benchmarks) or DyML-Product (one): each class has two classes below it."
    root = Path(root)
    rows = [(f"{i}.jpg", i // images // 4, i // images // 2, 100 + i // images) for i in range(fine * images)]
    for i, (name, *_) in enumerate(rows): put(root / "train" / "imgs" / name, jpeg([1, i]))
    put(root / "train" / "label.csv", glued(("fname", "coarse_id", "middle_id", "fine_id"), rows))
    if kind == "product":
        rows = [(f"{i}.jpg", i // 12, i // 6, i // 3) for i in range(24)]
        for i, (name, *_) in enumerate(rows): put(root / "mini-bmk_all_in_one" / "imgs" / name, jpeg([2, i]))
        put(root / "mini-bmk_all_in_one" / "label.csv", glued(("fname", "coarse_id", "middle_id", "fine_id"), rows))
        return root
    for b, (level, classes, each) in enumerate((("fine", 5, 4), ("middle", 4, 5), ("coarse", 2, 9))):
        gallery = [(f"{i}.jpg", 10 * b + i // each) for i in range(classes * each)]
        # two images a class, in another order and numbered anew
        asked = [i for i in range(len(gallery)) if i % each < 2][::-1]
        for i, (name, _) in enumerate(gallery): put(root / f"bmk_{level}" / "gallery" / name, jpeg([3 + b, i]))
        for i, g in enumerate(asked): put(root / f"bmk_{level}" / "query" / f"{i}.jpg", jpeg([3 + b, g]))
        put(root / f"bmk_{level}" / "gallery.csv", glued(("fname", "labels"), gallery))
        put(root / f"bmk_{level}" / "query.csv", glued(("fname", "labels"), [(f"{i}.jpg", gallery[g][1]) for i,
                                                                             g in enumerate(asked)]))
    return root


# ---- VehicleID_V1.0: image/0000001.jpg, lists of "image vehicle"

def make_vehicleid(root, attributes=True):
    "PKU VehicleID: 14 training vehicles, test lists of 4, 6 and 8 under the official names, each within the next."
    root, number, of = Path(root), 0, {}
    for vehicle in range(22):
        of[vehicle] = [number + j + 1 for j in range(3 + vehicle % 2)]
        number = of[vehicle][-1]
        for n in of[vehicle]: put(root / "image" / f"{n:07d}.jpg", jpeg([6, n]))
    lists = {"train_list": range(14), "test_list_800": range(14, 18), "test_list_1600": range(14, 20),
             "test_list_2400": range(14, 22)}
    for name, vehicles in lists.items():
        put(root / "train_test_split" / f"{name}.txt", "".join(f"{n:07d} {v}\n" for v in vehicles for n in of[v]))
    put(root / "attribute" / "img2vid.txt", "".join(f"{n:07d} {v}\n" for v in of for n in of[v]))
    if attributes:
        # some vehicles have none
        put(root / "attribute" / "model_attr.txt", "".join(f"{v} {v // 4}\n" for v in of if v % 5))
        put(root / "attribute" / "color_attr.txt", "".join(f"{v} {v % 3}\n" for v in of if v % 5 and v % 2))
    return root


# ---- Google Landmarks v2: metadata beside train/ index/ test/, images at a/b/c/abc....jpg

GLD_LABELS = "landmark_id,category,supercategory,hierarchical_label,natural_or_human_made"


def image_id(part, i): return hashlib.md5(f"{part} {i}".encode()).hexdigest()[:16]


def make_gldv2(root):
    "12 training landmarks (2 without a hierarchical label), 6 in the index (1 without), 8 test images (3 ignored)."
    root = Path(root)
    kinds = [("church building", "church", "human-made"), ("lake", "lake", "natural"),
             ("arch bridge", "bridge", "human-made"), ("footbridge", "bridge", "human-made")]
    url = lambda i: f"http://commons.wikimedia.org/wiki/Category:Landmark,_{i}"  # the comma makes the field quoted

    def label_rows(ids, without):
        rows = [(i, f'"{url(i)}"', *(("", "", "") if n in without else kinds[n % 4])) for n, i in enumerate(ids)]
        return GLD_LABELS + "\n" + "".join(",".join(map(str, r)) + "\n" for r in rows)

    def images(part, n):
        ids = [image_id(part, i) for i in range(n)]
        for i, name in enumerate(ids):
            put(root / part / name[0] / name[1] / name[2] / f"{name}.jpg", jpeg([7, len(part), i]))
        return ids
    train, marks = images("train", 52), [1000 + 7 * i for i in range(12)]
    put(root / "train.csv",
        "id,url,landmark_id\n" + "".join(f'{t},"https://example.org/{i},x.jpg",{marks[i % 13 % 12]}\n' for i,
                                         t in enumerate(train)))
    clean = [(m, [t for i, t in enumerate(train) if i < 48 and marks[i % 12] == m]) for m in marks]
    put(root / "train_clean.csv", "landmark_id,images\n" + "".join(f"{m},{' '.join(ids)}\n" for m, ids in clean))
    put(root / "train_label_to_hierarchical.csv", label_rows(marks, (4, 9)))
    index, marks = images("index", 18), [3, 5, 8, 13, 21, 34]  # not the ids of train
    put(root / "index.csv", "id\n" + "".join(f"{i}\n" for i in index))
    put(root / "index_image_to_landmark.csv", "id,landmark_id\n" + "".join(f"{t},{marks[i % 6]}\n" for i,
                                                                           t in enumerate(index)))
    put(root / "index_label_to_hierarchical.csv", label_rows(marks, (5,)))
    test = images("test", 8)
    # 4 shows the landmark without a hierarchical label
    found = {0: (0, 6, 12), 1: (1, 7), 3: (2,), 4: (5, 11), 6: (3, 9, 15)}
    put(root / "test.csv", "id\n" + "".join(f"{t}\n" for t in test))
    rows = ["id,images,Usage"]
    for i, t in enumerate(test):
        usage = "Ignored" if i not in found else "Private" if i % 2 else "Public"
        rows.append(f"{t},{' '.join(index[j] for j in found[i]) if i in found else 'None'},{usage}")
    put(root / "retrieval_solution_v2.1.csv", "\n".join(rows) + "\n")
    return root
