"""What differs between two runs is named by key, also inside a list of sources."""

from lora_recipes.trained import _flat


def test_a_list_of_mappings_is_named_item_by_item_and_a_list_of_scalars_stays_a_value() -> None:
    values = {
        "dataset": [{"path": "a", "data_files": {"train": ["x", "y"]}}, {"path": "b", "weight": 2}],
        "lora": {"target_modules": ["q", "v"], "layer_replication": [[0, 1]], "modules_to_save": []},
    }
    assert _flat(values) == {
        "dataset.0.path": "a",
        "dataset.0.data_files.train": ["x", "y"],
        "dataset.1.path": "b",
        "dataset.1.weight": 2,
        "lora.target_modules": ["q", "v"],
        "lora.layer_replication": [[0, 1]],
        "lora.modules_to_save": [],
    }
