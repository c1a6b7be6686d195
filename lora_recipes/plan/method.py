"""What people call the way a recipe trains."""

from lora_recipes.recipe import Recipe
from lora_recipes.recipe.defaults import ALPHA, RANK


def method_of(recipe: Recipe) -> str:
    """What people call the way a recipe trains."""
    lora, training = recipe.section("lora"), recipe.section("training")
    if not lora:
        return "full"
    words = ["QLoRA" if recipe.get("quantization") else "LoRA"]
    if lora.get("use_dora"):
        words = ["QDoRA" if recipe.get("quantization") else "DoRA"]
    start = lora.get("init_lora_weights")
    names = {"pissa": "PiSSA", "olora": "OLoRA", "eva": "EVA", "loftq": "LoftQ"}
    words += [names[start.split("_")[0]]] if isinstance(start, str) and start.split("_")[0] in names else []
    words += ["rsLoRA"] if lora.get("use_rslora") else []
    words += ["LoRA+"] if training.get("loraplus_lr_ratio") else []
    words += ["LoRA-FA"] if training.get("lorafa") else []
    words += ["NEFTune"] if training.get("neftune_noise_alpha") else []
    words += ["DFT"] if training.get("loss_type") == "dft" else []
    words += ["trained tokens"] if lora.get("trainable_token_indices") else []
    return ", ".join(words)


def method_in_full(recipe: Recipe) -> str:
    """The same with rank, alpha and targets, as model cards say it."""
    lora = recipe.section("lora")
    if not lora:
        return "full fine-tuning"
    targets = lora.get("target_modules")
    where = targets if isinstance(targets, str) else ", ".join(targets or [])
    rank, alpha = lora.get("r", RANK), lora.get("lora_alpha", ALPHA)
    return f"{method_of(recipe)}, r = {rank}, alpha = {alpha}" + (f", on {where}" if where else "")
