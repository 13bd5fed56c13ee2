"""Small copies in the exact layout of CUB-200-2011, Cars-196, Stanford Online Products and In-shop, with oddities."""
from pathlib import Path

import numpy as np
from PIL import Image

# class ids on both sides of each published border, six of them in train so that validation gets one
CUB = {1: "001.Black_footed_Albatross", 2: "002.Laysan_Albatross", 50: "050.Eared_Grebe", 98: "098.Scott_Oriole",
       99: "099.Ovenbird",
       100: "100.Brown_Pelican", 101: "101.White_Pelican", 102: "102.Western_Wood_Pewee",
       200: "200.Common_Yellowthroat"}
CARS = {1: "AM General Hummer SUV 2000", 2: "Acura RL Sedan 2012", 50: "Buick Verano Sedan 2012",
        96: "Dodge Sprinter Cargo Van 2009",
        97: "Dodge Journey SUV 2012", 98: "Dodge Dakota Crew Cab 2010", 99: "Dodge Dakota Club Cab 2007",
        100: "Dodge Magnum Wagon 2008", 196: "smart fortwo Convertible 2012"}
SOP = {"train": {1: "bicycle", 2: "bicycle", 3: "chair", 4: "chair", 5: "coffee_maker", 6: "coffee_maker"},
       "test": {11319: "bicycle", 11320: "chair", 11321: "chair"}}
SUPERS = ["bicycle", "cabinet", "chair", "coffee_maker", "fan", "kettle", "lamp", "mug", "sofa", "stapler", "table",
          "toaster"]
INSHOP = [("WOMEN/Blouses_Shirts", 1, ("query", "query", "gallery", "gallery")),
          ("WOMEN/Tees_Tanks", 2, ("train", "train", "train")), ("MEN/Denim", 80, ("train", "train")),
          ("WOMEN/Denim", 81, ("query", "gallery", "gallery")), ("MEN/Denim", 82, ("train", "train")),
          ("MEN/Shirts_Polos", 83, ("query", "gallery")),
          ("WOMEN/Dresses", 7, ("train", "train")), ("WOMEN/Dresses", 8, ("train", "train")),
          ("MEN/Tees_Tanks", 7982, ("train", "train"))]


def jpeg(path, seed=0, size=(40, 30), mode="RGB"):
    "Write a small noisy JPEG."
    path.parent.mkdir(parents=True, exist_ok=True)
    r = np.random.default_rng(seed)
    Image.fromarray(r.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(mode).save(path, "JPEG",
                                                                                                  quality=70)


def lines(path, rows, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(r + end for r in rows).encode())


def make_cub(root, per_class=3):
    "CUB_200_2011/: ids from 1, labels in a file of their own, all 200 classes, one grey image; gives the folder."
    root = Path(root) / "CUB_200_2011"
    names = {i: CUB.get(i, f"{i:03d}.Bird_{i}") for i in range(1, 201)}
    images = [(c, f"{CUB[c]}/{CUB[c][4:]}_{k + 1:04d}_{100 * c + k}.jpg") for c in CUB for k in range(per_class)]
    for i, (c, path) in enumerate(images): jpeg(root / "images" / path, i, mode="L" if i == 1 else "RGB")
    lines(root / "images.txt", [f"{i} {p}" for i, (_, p) in enumerate(images, 1)])
    lines(root / "image_class_labels.txt", [f"{i} {c}" for i, (c, _) in enumerate(images, 1)])
    lines(root / "classes.txt", [f"{i} {n}" for i, n in names.items()])
    # the classifiers' split, on purpose another one
    lines(root / "train_test_split.txt", [f"{i} {i % 2}" for i in range(1, len(images) + 1)])
    return root


def taxonomy_cub(path, by="id"):
    "A taxonomy of the classes above: class, family, order."
    family = {1: "albatrosses", 2: "albatrosses", 50: "grebes", 98: "icterids", 99: "wood warblers", 100: "pelicans",
              101: "pelicans", 102: "tyrant flycatchers", 200: "wood warblers"}
    order = {"albatrosses": "Procellariiformes", "grebes": "Podicipediformes", "icterids": "Passeriformes",
             "wood warblers": "Passeriformes",
             "pelicans": "Pelecaniformes", "tyrant flycatchers": "Passeriformes"}
    lines(Path(path), ["class,family,order"] + [f"{c if by == 'id' else CUB[c]},{f},{order[f]}" for c,
                                                f in family.items()])
    return path


def _annotations(rows, text):
    "A MATLAB struct array as the authors saved it: boxes, class, and the file's name in field `text`."
    boxes = ("bbox_x1", "bbox_x2", "bbox_y1", "bbox_y2") if text == "fname" else ("bbox_x1", "bbox_y1", "bbox_x2",
                                                                                  "bbox_y2")
    fields = [*boxes, "class", "fname"] if text == "fname" else ["relative_im_path", *boxes, "class", "test"]
    out = np.zeros((1, len(rows)), dtype=[(f, object) for f in fields])
    for i, row in enumerate(rows):
        for f in fields:
            out[0, i][f] = row[f] if f == text else np.array([[row.get(f, 7)]], dtype=np.uint8
                                                             if f in ("class", "test") else np.uint16)
    return out


def make_cars(root, devkit=False, per_class=3):
    "Cars-196: `cars_annos.mat` with car_ims/, or the devkit with cars_train/ and cars_test/, whose file names repeat."
    from scipy.io import savemat
    root = Path(root) / ("stanford_cars" if devkit else "cars196")
    names = np.array([[CARS.get(i, f"Maker Model {i} 2000") for i in range(1, 197)]], dtype=object)
    images = [c for c in CARS for _ in range(per_class)]
    if not devkit:
        rows = [{"relative_im_path": f"car_ims/{i:06d}.jpg", "class": c, "test": i % 2} for i,
                c in enumerate(images, 1)]
        for i, row in enumerate(rows): jpeg(root / row["relative_im_path"], i)
        savemat(root / "cars_annos.mat", dict(annotations=_annotations(rows, "relative_im_path"), class_names=names))
        return root
    (root / "devkit").mkdir(parents=True)
    for part, where in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        of = images[part == "test"::2]  # half of each class to either, as in the devkit
        rows = [{"fname": f"{i:05d}.jpg", "class": c} for i, c in enumerate(of, 1)]
        for i, row in enumerate(rows): jpeg(root / f"cars_{part}" / row["fname"], i + 50 * (part == "test"))
        savemat(root / where, dict(annotations=_annotations(rows, "fname")))
    savemat(root / "devkit" / "cars_meta.mat", dict(class_names=names))
    return root


def make_sop(root, per_class=3):
    "Stanford_Online_Products/: a header line, ids that run on from train to test, capitals, folders named *_final."
    root, image_id = Path(root) / "Stanford_Online_Products", 0
    for part, classes in SOP.items():
        rows = ["image_id class_id super_class_id path"]
        for c, kind in classes.items():
            for k in range(per_class):
                image_id += 1
                path = f"{kind}_final/{111000000000 + c}_{k}.JPG"
                jpeg(root / path, image_id)
                rows.append(f"{image_id} {c} {SUPERS.index(kind) + 1} {path}")
        lines(root / f"Ebay_{part}.txt", rows)
    return root


def make_inshop(root, folders=False):
    "In-shop: a line with the count, a header, many blanks, rows of all parts mixed; `folders`: Eval/ and Img/."
    root, rows = Path(root) / "inshop", []
    for kind, item, parts in INSHOP:
        for k, part in enumerate(parts):
            path = f"img/{kind}/id_{item:08d}/{k + 1:02d}_{k + 1}_front.jpg"
            jpeg(root / ("Img" if folders else "") / path, 10 * item + k)
            rows.append(f"{path:<72} id_{item:08d} {part}")
    lines(root / ("Eval" if folders else "") / "list_eval_partition.txt",
          [str(len(rows)), "image_name item_id evaluation_status", *rows])
    return root
