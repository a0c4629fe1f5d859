# ruff: noqa: E501, a row of the table is a line
"""Kinds of user files and of damage, what is expected of each, and the test that proves it: one table for all of them.

The value is checked, or the words are, in the test that a row names; ``test_kinds.py`` sees to it that every such test exists, that it
holds the words of its row, and (slow) that it passes.
"""

from __future__ import annotations

from typing import NamedTuple

READ, REFUSED, MENDED = "read right", "refused in words", "goes on, said"


class Kind(NamedTuple):
    """what: the kind of file or damage. outcome: READ, REFUSED or MENDED (work goes on from what is sound, and says so). expected: the
    right value, in words, or literally (a part of) the message. test: "file.py::test", below tests/."""

    what: str
    outcome: str
    expected: str
    test: str


LORA, FP8, SETTINGS = "training/test_lora_scales.py", "core/test_scaled_fp8.py", "training/test_model_settings.py"
PICTURES, CONVERT, EMA = "training/test_picture_folders.py", "training/test_convert.py", "core/test_ema_keys.py"
YAML, DAMAGE, OUTPUTS = "training/test_yaml_values.py", "training/test_damage.py", "training/test_outputs.py"
FINITE, LAST, CLI, LOCK = (
    "training/test_not_finite.py",
    "training/test_last_words.py",
    "training/test_cli.py",
    "training/test_folder_lock.py",
)
LORA_FILES, CHECKPOINT, STOPS = "training/test_lora_files.py", "core/test_checkpoint.py", "training/test_stops.py"

KINDS = [
    # LoRAs
    Kind("LoRA with lora_alpha, r in diffusers' header", READ, "applied at alpha / r = 4", f"{LORA}::test_the_scale_is_that_of_training"),
    Kind("LoRA with use_rslora", READ, "alpha / sqrt(r)", f"{LORA}::test_the_scale_is_that_of_training"),
    Kind("LoRA with alpha and rank patterns", READ, "the pattern's alpha / r", f"{LORA}::test_the_scale_is_that_of_training"),
    Kind("LoRA with ss_network_alpha, conv_alpha", READ, "alpha / r, of kernels their own", f"{LORA}::test_kohyas_kernels_have_an_alpha_of_their_own"),
    Kind("LoRA with an .alpha tensor and a header", READ, "the tensor counts", f"{LORA}::test_a_tensor_counts_before_all_else"),
    Kind("PEFT's folder with adapter_config.json", READ, "lora_alpha / r", f"{LORA}::test_pefts_own_folder"),
    Kind("LoRA that says no alpha anywhere", MENDED, "does not say alpha for 1 weights", f"{LORA}::test_what_nothing_tells_is_said"),
    Kind("lora_alpha that is text, NaN or true", REFUSED, "expected a number", f"{LORA}::test_what_cannot_be_a_scale_is_refused"),
    Kind("LoRA header that is no JSON", REFUSED, "not valid JSON", f"{LORA}::test_what_cannot_be_a_scale_is_refused"),
    Kind("LoRA of a kind that is not read (OFT, GLoRA)", REFUSED, "is of the kind", f"{LORA_FILES}::test_refusals_name_file_and_key"),
    Kind("LoRA keys of which some fit", MENDED, "keys do not fit", f"{LORA_FILES}::test_keys_that_do_not_fit_are_counted_once"),
    Kind("LoRA headers with values of any type", READ, "the scale, or a ValueError", "training/test_hostile.py::test_hundreds_of_changes"),
    # float8
    Kind("scaled fp8, old marks", READ, "value x scale", f"{FP8}::test_a_weight_is_its_value_times_its_scale"),
    Kind("scaled fp8, new marks, in tensors or header", READ, "value x scale", f"{FP8}::test_a_weight_is_its_value_times_its_scale"),
    Kind("fp8 without marks", READ, "the values as they are", f"{FP8}::test_what_has_no_marks_comes_back_as_it_is"),
    Kind("fp8 whose scale is missing", REFUSED, "scale is missing", f"{FP8}::test_what_cannot_be_read_is_named"),
    Kind("fp8 scale of a wrong shape", REFUSED, "one for each row", f"{FP8}::test_what_cannot_be_read_is_named"),
    Kind("nvfp4 and other quantised formats", REFUSED, "'nvfp4'", f"{FP8}::test_what_cannot_be_read_is_named"),
    Kind("host MODEL with quantised layers", READ, "value x scale", "host/test_scaled_fp8.py::test_the_weights_are_the_hosts_and_the_files"),
    Kind("host CLIP with quantised layers", READ, "the contexts of value x scale", "host/test_scaled_fp8_text.py::test_captions_are_read_by_the_numbers"),
    Kind("Save DMM Model under an fp8 flag", MENDED, "narrow", "host/test_scaled_fp8.py::test_saving_says_what_it_narrowed"),
    # what a model predicts, and its clip skip
    Kind("SD1.5 that predicts v: yaml, metadata, tensors", READ, "prediction v", f"{SETTINGS}::test_every_place_that_says_what_a_model_predicts"),
    Kind("clip skip in metadata, yaml, behind the name", READ, "transformers' own states", f"{SETTINGS}::test_every_place_that_says_the_clip_skip"),
    Kind("a yaml beside the model that is something else", READ, "as without it", f"{SETTINGS}::test_a_yaml_that_is_something_else_is_left_alone"),
    # layouts
    Kind("weights in parts, with and without an index", READ, "the whole's bits", f"{CONVERT}::test_weights_in_parts_are_joined"),
    Kind("parts with a variant (.fp16) in the name", READ, "the whole's bits", f"{CONVERT}::test_a_variant_in_parts_is_joined"),
    Kind("single checkpoint in parts", READ, "the whole's bits", f"{CONVERT}::test_a_checkpoint_in_parts_is_joined"),
    Kind("folder with variants alone", READ, "the best of them", f"{CONVERT}::test_of_a_folder_with_variants_alone_the_best_is_read"),
    Kind("averaged weights alone (model_ema.)", READ, "the UNet's bits", f"{EMA}::test_the_averaged_unet_is_the_unet"),
    Kind("averaged keys that fit no UNet", REFUSED, "model_ema", f"{EMA}::test_what_is_no_weight_of_the_unet_is_named"),
    Kind("pickles", REFUSED, "pickle", f"{CONVERT}::test_pickles_are_never_opened"),
    Kind("damaged file of styles in info", REFUSED, "damaged", f"{CONVERT}::test_info_says_when_a_file_of_styles_is_damaged"),
    Kind("hostile metadata of styles", REFUSED, "dmm.styles", f"{CHECKPOINT}::test_hostile_metadata"),
    # pictures and captions
    Kind("pictures .jfif .jpe .avif ...", READ, "the picture's colours", f"{PICTURES}::test_every_ending_is_read_in_any_case"),
    Kind("pictures .heic", READ, "or named with the package", f"{PICTURES}::test_heic_is_read_where_pillow_can_and_named_where_not"),
    Kind("pictures of kinds that are not read", MENDED, "are not read: save it as .png or .jpg", f"{PICTURES}::test_kinds_that_are_not_read_are_named"),
    Kind("captions in .caption, .TXT, c.png.txt", READ, "each picture its own", f"{PICTURES}::test_every_way_to_write_a_caption_beside_a_picture"),
    Kind("two captions that differ", REFUSED, "it has two captions", f"{PICTURES}::test_two_captions_must_say_the_same"),
    Kind("names in another Unicode normal form", READ, "the same picture", f"{PICTURES}::test_names_match_in_any_unicode_normal_form"),
    Kind("metadata.jsonl with backslashes", READ, "the same picture", f"{PICTURES}::test_slashes_in_either_direction"),
    Kind("captions without a picture", MENDED, "alone", f"{PICTURES}::test_a_caption_without_its_picture_is_in_the_report"),
    # configs, names, outputs
    Kind("YAML scalars that are no text", REFUSED, "put it into quotes", f"{YAML}::test_what_yaml_made_of_it_is_said"),
    Kind("YAML numbers as people write them", READ, "5e-1 is 0.5", f"{YAML}::test_values_as_people_write_them"),
    Kind("YAML bombs", REFUSED, "aliases", f"{YAML}::test_bombs"),
    Kind("names, texts and files that cannot be stored", REFUSED, "holds the control character", f"{OUTPUTS}::test_what_cannot_be_stored_is_refused_before_anything_is_written"),
    Kind("the same in Edit Style", REFUSED, "holds the control character", "host/test_edit_style.py::test_what_is_refused"),
    Kind("the same in Name a Blend", REFUSED, "holds the control character", "host/test_style_control.py::test_blends_that_cannot_be_named"),
    Kind("an output that is an input", REFUSED, "one of the inputs", f"{OUTPUTS}::test_what_cannot_be_stored_is_refused_before_anything_is_written"),
    Kind("too little disk for the states", REFUSED, "too little disk", f"{OUTPUTS}::test_what_cannot_be_stored_is_refused_before_anything_is_written"),
    Kind("file names of 300 characters", REFUSED, "too long", f"{CLI}::test_a_name_that_is_too_long_for_the_disk"),
    Kind("NAME=FILE with more equals signs", READ, "name and file", f"{CLI}::test_names_and_paths_may_hold_an_equals_sign"),
    # numbers that are none
    Kind("NaN in latents", REFUSED, "the first in row 6", f"{FINITE}::test_latents_name_the_row_and_the_caption"),
    Kind("NaN in a cache", REFUSED, "has NaN or infinite numbers in row 1", f"{FINITE}::test_a_cache_names_the_file_the_row_and_the_picture"),
    Kind("NaN in a teacher", REFUSED, "the teacher itself predicts NaN", f"{FINITE}::test_a_loss_says_whose_fault_it_is"),
    # damage and interruptions
    Kind("bit flips and cuts anywhere in a run folder", MENDED, "the same weights, or words", f"{DAMAGE}::test_no_damage_in_a_run_folder_gives_a_wrong_result_without_a_word"),
    Kind("a damaged run state", MENDED, "damaged", f"{DAMAGE}::test_a_damaged_state_is_named_and_the_one_before_it_gone_on_from"),
    Kind("a damaged log.jsonl", READ, "the run's own result", f"{DAMAGE}::test_a_damaged_log_never_stops_a_run"),
    Kind("a flipped bit in a cache", REFUSED, "row", f"{DAMAGE}::test_a_flipped_bit_in_a_shard_is_found_when_its_row_is_read"),
    Kind("SIGKILL in the middle of saves", READ, "bitwise the whole run's", "training/test_state.py::test_kill_nine_in_the_middle_of_saves"),
    Kind("what a killed write leaves", READ, "gone with the next write", "core/test_files.py::test_a_killed_write_is_cleared_by_the_next"),
    Kind("Ctrl-C, SIGTERM in a contact sheet", MENDED, "dmm: interrupted; what is done is kept", f"{STOPS}::test_a_signal_ends_a_contact_sheet_and_the_run_has_saved_itself"),
    Kind("two processes on one run folder", REFUSED, "is in use by process", f"{LOCK}::test_the_second_process_is_refused_and_the_first_named"),
    Kind("two processes on one cache, one merge", REFUSED, "is in use by process", f"{LOCK}::test_two_commands_in_one_folder"),
    Kind("a full disk", REFUSED, "No space left", f"{LAST}::test_a_full_disk_is_a_line_that_names_the_file"),
    Kind("no CUDA driver", REFUSED, "cuda", f"{LAST}::test_no_cuda_is_said_before_anything_is_loaded"),
    Kind("| head on a command", READ, "no complaint", f"{LAST}::test_a_reader_that_has_gone_is_no_error"),
    Kind("output folder emptied while ComfyUI runs", READ, "models load", "host/test_model_folders.py::test_a_running_host_outlives_an_emptied_output_folder"),
]  # fmt: skip


def table() -> str:
    """The kinds as Markdown."""
    rows = [f"| {k.what} | {k.outcome} | {k.expected} | `{k.test}` |" for k in KINDS]
    return "\n".join(["| Kind | Outcome | Value or words | Test |", "| --- | --- | --- | --- |", *rows])
