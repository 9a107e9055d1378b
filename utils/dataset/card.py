"""What makes OUT/shards a folder to upload as it is: README.md (the hub's dataset card), croissant.json, SHA256SUMS.

README.md      YAML header of huggingface.co (licence, features, class ids), then for people: generator, prompts, seeds,
               how to draw it again, the classes
croissant.json metadata of MLCommons' Croissant 1.0: the shards with their hashes, the images and classes in them
dataset.json   the dataset's own record: recipe, hashes of the model's files, environment
SHA256SUMS     of all files but README.md, for `sha256sum -c`

They are taken away before a shard changes and written after the last one, README.md at the very end: what a killed
packing leaves describes itself as nothing. The same dataset gives the same bytes.
"""

import json
from pathlib import Path
from typing import Any

from utils.dataset.folder import PROMPTS, Dataset
from utils.storage import atomic_write, readable, sha256_file, write_json

CARD, CROISSANT, SUMS = "README.md", "croissant.json", "SHA256SUMS"
# Part of the hub id of a model or LoRA -> the licence that its page states (docs/generators.md says where it was read).
# It binds who draws with the model and, for those of the OpenRAIL family, restricts uses of what was drawn.
LICENCES = {
    "CompVis/stable-diffusion-v1": "creativeml-openrail-m",
    "stable-diffusion-v1-5/": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/sd-turbo": "sai-nc-community",
    "stabilityai/sdxl-turbo": "sai-nc-community",
    "stabilityai/stable-diffusion-3": "stabilityai-ai-community",
    "ByteDance/SDXL-Lightning": "openrail++",
    "SimianLuo/LCM_Dreamshaper_v7": "mit",
    "latent-consistency/lcm-lora-sd": "openrail++",
    "black-forest-labs/FLUX.1-dev": "flux-1-dev-non-commercial-license",
    "black-forest-labs/FLUX.1-schnell": "apache-2.0",
    "PixArt-alpha/PixArt-Sigma": "openrail++",
}
OF_THE_HUB = ("creativeml-openrail-m", "openrail++", "mit", "apache-2.0")  # others it calls "other", by license_name
SIZES = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
# Croissant 1.0's own @context, without which its terms mean nothing.
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}
CR_TERMS = """
citeAs column equivalentProperty extract field fileProperty fileObject fileSet format includes isLiveDataset jsonPath
key md5 parentField path recordSet references regex repeated replace samplingRate separator source subField transform
"""


def withdraw_card(shards: Path) -> None:
    """Take away what describes the SHARDS, the card first: they are about to change."""
    for name in (CARD, SUMS, CROISSANT, "dataset.json", PROMPTS, "index.json"):
        (shards / name).unlink(missing_ok=True)


def write_card(dataset: Dataset, shards: list[dict[str, Any]], stems: list[str]) -> None:
    """Describe the SHARDS, the notes of all that are written; STEMS: the class ids as the members' names have them."""
    folder = dataset.root / "shards"
    for name in ("dataset.json", PROMPTS):
        if (dataset.root / name).is_file():
            atomic_write(folder / name, (dataset.root / name).read_bytes(), fsync=True)
    write_json(folder / CROISSANT, croissant(dataset, shards, stems))
    hashes = {shard["file"]: shard["sha256"] for shard in shards}
    notes = [str(Path(shard["file"]).with_suffix(".json")) for shard in shards]
    others = [*notes, "index.json", "dataset.json", PROMPTS, CROISSANT]
    hashes |= {name: sha256_file(folder / name) for name in others if (folder / name).is_file()}
    atomic_write(folder / SUMS, "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode(), fsync=True)
    atomic_write(folder / CARD, readable(card(dataset, shards)).encode(), fsync=True)


def licence_of(dataset: Dataset) -> str:
    """That of the generator and of its LoRA; "unknown" where one is not in LICENCES or they have different ones."""
    models = [dataset.info["model"]["id"], *(dataset.recipe.get("lora") or [])]
    found = {next((licence for part, licence in LICENCES.items() if part in model), "unknown") for model in models}
    return found.pop() if len(found) == 1 else "unknown"


def suffix_of(dataset: Dataset) -> str:
    """Of the images: "jpg"."""
    return dataset.folders[0].suffix[1:]


def card(dataset: Dataset, shards: list[dict[str, Any]]) -> str:
    """The text of README.md."""
    info, recipe = dataset.info, dataset.recipe
    images, model, size = sum(shard["images"] for shard in shards), info["model"], suffix_of(dataset)
    files = [shard["file"] for shard in shards]  # by name: other tar files in the folder are none of it
    known = licence_of(dataset)
    header: dict[str, Any] = {
        **({"license": known} if known in OF_THE_HUB else {"license": "other", "license_name": known}),
        "pretty_name": info["name"],
        "task_categories": ["image-classification"],
        "tags": ["synthetic", "imagenet-sd", "webdataset"],
        "size_categories": [next((name for most, name in SIZES if images < most), "10M<n<100M")],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": files}]}],
        "dataset_info": {"features": features(dataset)},
    }
    asked = {key: value for key, value in recipe.items() if value is not None and key not in ("classes", "prompts")}
    licence = f"`{known}`" if known != "unknown" else "not known here: look it up and name it above"
    prompts = f"the texts of `{PROMPTS}`" if recipe.get("prompts") else f"the template `{cell(recipe['prompt'])}`"
    lines = [
        "---",
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items()),
        "---",
        f"# {cell(info['name'])}",
        "",
        f"{images:,} synthetic images of {len(dataset.folders):,} classes, drawn by imagenet-sd with "
        f"`{cell(model['id'])}`{', revision `' + cell(model['revision']) + '`' if model.get('revision') else ''}.",
        "",
        f"- Licence of the generator: {licence}. It may restrict what the images are used for.",
        f"- Prompts: {prompts}. Supervision: {recipe.get('supervision') or 'not recorded'}.",
        f"- Seeds: base seed {recipe.get('seed', 0)}; each image's own prompt, seed and SHA-256 are in its `.json`.",
        "- No person in them is real on purpose, but the generator saw real ones; its biases are in the images.",
        "",
        "## Read it",
        "",
        "```python",
        f'datasets.load_dataset("PATH", split="train")  # {size}: the image, cls: the label, json: prompt, seed ...',
        f'webdataset.WebDataset(sorted(glob("PATH/*.tar"))).decode("rgb8").to_tuple("{size}", "cls")',
        "```",
        "",
        "`python train.py --data PATH` of imagenet-sd reads it too. `sha256sum -c SHA256SUMS` checks the files.",
        "",
        "## Draw it again",
        "",
        *([f"    {' '.join(str(info['command']).split())}", ""] if info.get("command") else []),
        "`dataset.json` has the whole recipe, the hashes of the model's files and the environment. On the same",
        "hardware and software the images come out the same bytes.",
        "",
        "| key | value |",
        "|---|---|",
        *(f"| {cell(key)} | {cell(json.dumps(value, ensure_ascii=False))} |" for key, value in asked.items()),
        "",
        "## Classes",
        "",
        "| label | id | name | images |",
        "|---|---|---|---|",
        *(f"| {n} | {row['id']} | {cell(row['name'])} | {row['images']} |" for n, row in enumerate(info["classes"])),
    ]
    return "\n".join(lines) + "\n"


def cell(text: Any) -> str:
    """TEXT in one line that no Markdown table, code or HTML breaks at."""
    text = " ".join(str(text).split()).replace("|", "\\|").replace("`", "'")
    return text.replace("<", "&lt;")


def features(dataset: Dataset) -> list[dict[str, Any]]:
    """Of a sample, as `datasets` reads them: from a few samples it would guess wrongly what is rarely there."""
    types = {"id": "string", "index": "int64", "prompt": "string", "seed": "int64", "attempt": "int64"}
    entry: list[dict[str, Any]] = [{"name": name, "dtype": dtype} for name, dtype in types.items()]
    entry.append({"name": "rejected", "list": "string"})
    entry += [{"name": name, "dtype": dtype} for name, dtype in (("safety", "bool"), ("bytes", "int64"))]
    entry += [{"name": "sha256", "dtype": "string"}, {"name": "label", "dtype": "int64"}]
    names = {str(label): folder.id for label, folder in enumerate(dataset.folders)}
    return [
        {"name": suffix_of(dataset), "dtype": "image"},
        {"name": "json", "struct": entry},
        {"name": "cls", "dtype": {"class_label": {"names": names}}},
        {"name": "__key__", "dtype": "string"},
        {"name": "__url__", "dtype": "string"},
    ]


def croissant(dataset: Dataset, shards: list[dict[str, Any]], stems: list[str]) -> dict[str, Any]:
    """Croissant 1.0: the tar files, the images in them, and records of (image, class id) and of the classes."""
    suffix, folder, licence = suffix_of(dataset), dataset.root / "shards", licence_of(dataset)
    files = [
        {
            "@type": "cr:FileObject",
            "@id": shard["file"],
            "name": shard["file"],
            "contentUrl": shard["file"],
            "contentSize": f"{(folder / shard['file']).stat().st_size} B",
            "encodingFormat": "application/x-tar",
            "sha256": shard["sha256"],
        }
        for shard in shards
    ]
    kind = {"jpg": "jpeg"}.get(suffix, suffix)
    images = {
        "@type": "cr:FileSet",
        "@id": "files",
        "name": "files",
        "containedIn": [{"@id": shard["file"]} for shard in shards],
        "encodingFormat": f"image/{kind}",
        "includes": f"*.{suffix}",
    }

    def field(name: str, of: str, kind: str, **more: Any) -> dict[str, Any]:
        return {"@type": "cr:Field", "@id": f"{of}/{name}", "name": f"{of}/{name}", "dataType": kind, **more}

    content = {"fileSet": {"@id": "files"}, "extract": {"fileProperty": "content"}}
    wnid = {"fileSet": {"@id": "files"}, "extract": {"fileProperty": "filename"}}
    wnid["transform"] = {"regex": r"^(.+)_\d+\.\w+$"}
    classes = [
        {"classes/id": stem, "classes/label": label, "classes/name": row["name"]}
        for label, (stem, row) in enumerate(zip(stems, dataset.info["classes"], strict=True))
    ]
    columns = (("id", "sc:Text"), ("label", "sc:Integer"), ("name", "sc:Text"))
    records = [
        {
            "@type": "cr:RecordSet",
            "@id": "classes",
            "name": "classes",
            "key": {"@id": "classes/id"},
            "field": [field(name, "classes", kind) for name, kind in columns],
            "data": classes,
        },
        {
            "@type": "cr:RecordSet",
            "@id": "images",
            "name": "images",
            "field": [
                field("image", "images", "sc:ImageObject", source=content),
                field("class", "images", "sc:Text", source=wnid, references={"field": {"@id": "classes/id"}}),
            ],
        },
    ]
    return {
        "@context": CONTEXT | {term: f"cr:{term}" for term in CR_TERMS.split()},
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": dataset.info["name"],
        "description": f"Synthetic images of {len(classes)} classes, drawn with {dataset.info['model']['id']}.",
        "license": licence,
        "distribution": [*files, images],
        "recordSet": records,
    }
