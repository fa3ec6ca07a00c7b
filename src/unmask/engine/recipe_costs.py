"""`unmask plan RECIPE`: the cost of a recipe without any images: parameters, FLOPs, steps, and a plan for GPUs.

All numbers are counted on the method itself (`engine/flops.py`). Some papers report multiply-accumulates ("G MACs",
often called FLOPs) and others FLOPs (1 MAC = 2 FLOPs), so both are printed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from unmask.config import Config, override
from unmask.console import Console
from unmask.engine import initial_weights
from unmask.engine.cluster_plan import Cluster, ClusterPlan, plan_cluster, print_cluster_plan
from unmask.engine.flops import Flops, blocks_flops, build_unallocated, count_flops, typical_images
from unmask.engine.make_plan import DEFAULT_EPOCHS, require_divisible
from unmask.engine.resolve import draft_config
from unmask.method import Method
from unmask.methods.mae import MAE
from unmask.nn.masks import num_kept
from unmask.optim import peak_lr
from unmask.recipes import catalogue

IMAGENET = 1_281_167


def recipe_costs(
    recipe: str, *, settings: Sequence[str] = (), cluster: Cluster | None = None, verify: bool = False
) -> dict[str, Any]:
    """Return the costs as the object that --json prints. Raises ConfigError for invalid settings.

    cluster: GPUs to plan for. verify: see `plan_cluster`.
    """
    return costs_and_plan(recipe, settings=settings, cluster=cluster, verify=verify)[0]


def costs_and_plan(
    recipe: str, *, settings: Sequence[str] = (), cluster: Cluster | None = None, verify: bool = False
) -> tuple[dict[str, Any], ClusterPlan | None]:
    """Return the costs as `recipe_costs` does, and the plan for the cluster, if there is one."""
    tokenizer, stand_in = stand_in_tokenizer(recipe, settings)
    config = draft_config(None, recipe, [*stand_in, *settings], None)
    batches = schedule(config, cluster)
    images = typical_images(config)
    method = build_unallocated(config, images)
    flops = count_flops(config, images)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in method.named_children()}
    whole = sum(p.numel() for p in method.parameters())
    encoder, decoder = parts.get("encoder", 0), parts.get("decoder", 0)
    plan = None if cluster is None else plan_cluster(config, images, flops, cluster, verify=verify)
    found = {
        "recipe": config.recipe,
        "method": config.method.name,
        "tokenizer": tokenizer,
        "image": [images.channels, *images.size],
        "parameters": {"all": whole, "encoder": encoder, "decoder": decoder, "rest": whole - encoder - decoder},
        "flops": {
            "encoder_all_patches": flops.whole,
            "encoder": flops.encoder,
            "decoder": flops.decoder,
            "rest": flops.rest,
            "forward": flops.forward,
            "training": flops.training,
            **redundant_compute(method, flops),
        },
        "ratios": ratios(method, flops),
        **batches,
        **({} if plan is None else {"cluster": plan.as_json()}),
    }
    return found, plan


def stand_in_tokenizer(recipe: str, settings: Sequence[str], dvae: str | None = None) -> tuple[str | None, list[str]]:
    """Return (recipe of a dVAE, settings as KEY=VALUE) as a stand-in for the tokenizer of a method that predicts codes.

    The settings describe the tokenizer's network, without weights. The result is (None, []) for methods without a
    tokenizer. dvae: recipe of the dVAE (None: DALL-E's dVAE for patches of 14 pixels or more, else the small dVAE).
    """
    chosen = [text for text in settings if text.strip().startswith("method.")]
    method: Any = override(catalogue.find(recipe), chosen).method
    if not method.needs_tokenizer:
        return None, []
    name = dvae or ("dvae_dalle" if min(method.encoder.patch) >= 14 else "dvae_nano")
    network = catalogue.find(name).method.model_dump(mode="json")["encoder"]
    stand_in = {"run": name, "source": initial_weights.DVAE, "target": initial_weights.TOKENIZER}
    return name, [f"method.tokenizer={json.dumps(network)}", f"graft={json.dumps([stand_in])}"]


def redundant_compute(method: Method, flops: Flops) -> dict[str, int]:
    """Return FLOPs per image including the redundant compute of MAE's published code, or {} if that code does no
    redundant compute for this method.

    The published code also embeds the hidden patches, and applies the decoder's last block and the prediction layer to
    all tokens. The keys of the result end in "_idle_work" because scripts read them from `unmask plan --json`.
    """
    if not isinstance(method, MAE) or not flops.masked or method.everywhere:
        return {}
    encoder, decoder = method.encoder, method.decoder
    patches = encoder.grid[0] * encoder.grid[1]
    kept = num_kept(patches, method.mask_ratio)
    hidden, width = patches - kept, decoder.embed.out_features
    embedding = 2 * hidden * encoder.patch_embed.proj.weight.numel()
    block = decoder.blocks[-1:]
    block = blocks_flops(block, 1 + patches, width) - blocks_flops(block, 1 + patches, width, last=hidden)
    prediction = 2 * (1 + kept) * decoder.pred.weight.numel()
    return {
        "forward_with_idle_work": flops.forward + embedding + block + prediction,
        # The backward pass of the embedding is one matrix product, not two, because pixels need no gradient.
        "training_with_idle_work": flops.training + 2 * embedding + 3 * (block + prediction),
    }


def ratios(method: Method, flops: Flops) -> dict[str, float]:
    """Return ratios that show how much compute masking saves, or {} if the encoder processes all patches or there is no
    decoder.

    "everything" is the number of FLOPs of a forward pass with the encoder on all patches (as with mask tokens), divided
    by the actual number. The other keys exist for MAE only, and count transformer blocks without the class token, as
    papers usually do. "encoder_blocks_all_patches", "encoder_blocks_visible" and "decoder_blocks" are FLOPs. "blocks"
    is the number of FLOPs of all blocks with the encoder on all patches, divided by that with the encoder on visible
    patches (3.3 for ViT-L in the paper); "encoder" is the same ratio for the encoder alone. "decoder_per_token" is the
    number of FLOPs per token in the decoder divided by that in the encoder (9 % in the paper).
    """
    if not flops.decoder or not flops.masked:
        return {}
    found = {"everything": (flops.whole + flops.decoder + flops.rest) / flops.forward}
    if not isinstance(method, MAE):
        return found
    encoder, decoder, ratio = method.encoder, method.decoder, method.mask_ratio
    patches = encoder.grid[0] * encoder.grid[1]
    full = blocks_flops(encoder.blocks, patches, encoder.width)
    seen = blocks_flops(encoder.blocks, num_kept(patches, ratio), encoder.width)
    light = blocks_flops(decoder.blocks, patches, decoder.embed.out_features)
    return found | {
        "encoder_blocks_all_patches": full,
        "encoder_blocks_visible": seen,
        "decoder_blocks": light,
        "blocks": (full + light) / (seen + light),
        "encoder": full / seen,
        "decoder_per_token": light / full,
    }


def schedule(config: Config, cluster: Cluster | None) -> dict[str, Any]:
    """Return batch size, learning rate, and the number of steps for as many images as ImageNet-1K has."""
    train, batch = config.train, config.train.batch_size
    if cluster is not None:
        require_divisible(config, cluster.size)
    epochs = train.epochs if train.epochs is not None else DEFAULT_EPOCHS
    steps = train.steps if train.steps is not None else math.ceil(epochs * IMAGENET / batch)
    found = {
        "batch_size": batch,
        "parallel": train.parallel,
        "recompute": train.recompute,
        "peak_lr": peak_lr(config.optim, batch),
        "base_lr": config.optim.base_lr,
        "imagenet_steps": steps,
        "imagenet_epochs": steps * batch / IMAGENET,
        "warmup_steps": round(config.optim.warmup * steps),
    }
    return found if cluster is None else found | {"gpus": cluster.size, "images_per_gpu": batch // cluster.size}


def print_costs(found: dict[str, Any], console: Console, plan: ClusterPlan | None = None) -> None:
    """Print the costs, and the plan for a cluster, as text."""
    parameters, flops, share = found["parameters"], found["flops"], found["ratios"]
    channels, height, width = found["image"]
    console.print(f"{found['recipe']}: {found['method']} on images of {height} x {width} pixels, {channels} channels")
    if found["tokenizer"]:
        console.print(f"tokenizer: recipe {found['tokenizer']}, frozen, counted in the rest")
    rest = f", the rest {_millions(parameters['rest'])}" if parameters["rest"] else ""
    decoder = f", decoder {_millions(parameters['decoder'])}" if parameters["decoder"] else ""
    console.print(
        f"parameters: {_millions(parameters['all'])} (encoder {_millions(parameters['encoder'])}{decoder}{rest})"
    )
    console.print("per image (counting matrix products and convolutions; 1 multiply-accumulate = 2 FLOPs):")
    lines = [
        ("encoder, every patch" if share else "encoder, in evaluations", flops["encoder_all_patches"]),
        ("encoder, visible patches" if share else "encoder, in the loss", flops["encoder"]),
        ("decoder", flops["decoder"]),
        ("the rest of the loss", flops["rest"]),
        ("forward pass", flops["forward"]),
        ("training, forward + backward", flops["training"]),
    ]
    for name, number in lines:
        if number:
            more = f"  = {number / flops['forward']:.2f} x forward" if name.startswith("training") else ""
            console.print(f"  {name:29s}{_billions(number / 2):>9s} GMACs {_billions(number):>9s} GFLOPs{more}")
    if "training_with_idle_work" in flops:
        published = flops["training_with_idle_work"]
        console.print(
            f"  training with the published code takes {_billions(published)} GFLOPs, "
            f"{published / flops['training']:.3f} x: it also embeds hidden patches and predicts visible patches"
        )
    if share:
        console.print(
            f"leaving mask tokens out of the encoder makes the forward pass {share['everything']:.2f} x cheaper, all "
            "parts included (only hidden patches are predicted)"
        )
    if "blocks" in share:
        console.print(
            f"  blocks only, no class token: {share['blocks']:.2f} x, from "
            f"{_billions(share['encoder_blocks_all_patches'] / 2)} + {_billions(share['decoder_blocks'] / 2)} to "
            f"{_billions(share['encoder_blocks_visible'] / 2)} + {_billions(share['decoder_blocks'] / 2)} GMACs; "
            f"encoder alone: {share['encoder']:.2f} x"
        )
        console.print(f"  cost per token in the decoder: {share['decoder_per_token']:.1%} of that in the encoder")
    gpus = f"; on {found['gpus']} GPUs, images of each per step: {found['images_per_gpu']}" if "gpus" in found else ""
    console.print(
        f"batch {found['batch_size']}, peak learning rate {found['peak_lr']:.3g} (base {found['base_lr']:.3g} x batch "
        f"/ 256){gpus}"
    )
    console.print(
        f"for ImageNet-1K's {IMAGENET:,} images: {found['imagenet_steps']:,} steps = {found['imagenet_epochs']:.4g} "
        f"epochs, {found['warmup_steps']:,} of them warm-up, {_training(found)} FLOPs in all"
    )
    if plan is not None:
        print_cluster_plan(plan, found["imagenet_steps"], console)


def _training(found: dict[str, Any]) -> str:
    return f"{found['flops']['training'] * found['batch_size'] * found['imagenet_steps']:.2e}"


def _millions(number: float) -> str:
    return f"{number / 1e6:.2f} M"


def _billions(number: float) -> str:
    return f"{number / 1e9:.2f}" if number >= 1e9 else f"{number / 1e9:.4f}"
