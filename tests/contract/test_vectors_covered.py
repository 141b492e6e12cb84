"""Where each API vector of ``wave.md`` §12 is tested; the tests that this names have to be there."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent

IDS, VALUES, REQUESTS = (f"contract/test_vectors_{name}.py" for name in ("ids", "values", "requests"))
NAMING, FREEZE, OCI, RECIPES = (f"test_{name}.py" for name in ("naming", "freeze", "oci", "recipes"))

# V35 is not among them: it signs addresses of a content network for blobs, and blobs are sent from here (decision 19).
VECTORS: dict[str, dict[str, tuple[str, ...]]] = {
    "V1": {NAMING: ("test_names_and_values_are_hashed_in_order",), IDS: ("test_v1_values_without_names",)},
    "V2": {
        NAMING: ("test_container_ids_are_those_of_the_service",),
        REQUESTS: ("test_v2_ids_of_builds", "test_v2_the_pages_id_is_that_of_another_text"),
    },
    "V3": {NAMING: ("test_configs_hash_as_in_the_service", "test_layers_hash_as_in_the_service")},
    "V4": {IDS: ("test_v4_scan_ids",)},
    "V5": {IDS: ("test_v5_routes",)},
    "V6": {
        "test_reference.py": ("test_parse", "test_registry_host", "test_no_registry_host"),
        REQUESTS: ("test_v6_no_image",),
    },
    "V7": {OCI: ("test_platform",), REQUESTS: ("test_v7_no_platform", "test_v7_platforms_of_builds")},
    "V8": {OCI: ("test_platform_matches", "test_platform_does_not_match")},
    "V9": {NAMING: ("test_images_are_named_by_strategy",)},
    "V10": {NAMING: ("test_recipe_names",)},
    "V11": {NAMING: ("test_names_are_normalised",)},
    "V12": {NAMING: ("test_names_are_joined",)},
    "V13": {
        NAMING: (
            "test_entries_become_an_environment_file",
            "test_a_wrong_pip_prefix_is_explained",
            "test_channels_are_added_to_an_environment",
            "test_quotes_are_trimmed",
        )
    },
    "V14": {
        RECIPES: ("test_micromamba_1_is_replaced_in_v2",),
        REQUESTS: (
            "test_v14_default_templates",
            "test_v14_a_lock_is_fetched_by_the_build",
            "test_v14_only_one_lock",
            "test_v14_nothing_to_install",
            "test_v14_packages_of_bioconductor",
        ),
    },
    "V15": {
        "test_route.py": ("test_routes",),
        REQUESTS: (
            "test_v15_a_token_leads_to_its_image",
            "test_v15_a_durable_image_is_not_pulled_by_its_token",
            "test_v15_no_paths_of_registries",
        ),
    },
    "V16": {VALUES: ("test_v16_locations_in_registries", "test_v16_a_location_names_registry_and_digest")},
    "V17": {VALUES: ("test_v17_answers",)},
    "V18": {VALUES: ("test_v18_endpoints_of_old",)},
    "V19": {
        "test_reference.py": ("test_image_name_errors", "test_repository_name_errors"),
        REQUESTS: ("test_v19_messages", "test_v19_messages_of_mirrors"),
    },
    "V20": {VALUES: ("test_v20_repositories_stay_what_they_are",)},
    "V21": {NAMING: ("test_only_builds_to_the_default_repository_share_its_cache",)},
    "V22": {VALUES: ("test_v22_targets_of_mirrors",), REQUESTS: ("test_v22_mirrors_have_ids_of_their_own",)},
    "V23": {FREEZE: ("test_changes_are_written_behind_the_image", "test_a_file_without_changes_stays_as_it_is")},
    "V24": {FREEZE: ("test_from_lines", "test_entrypoint_lines", "test_what_a_file_builds_on")},
    "V28": {
        "test_usage.py": ("test_an_organisation_is_the_domain",),
        "test_api_metrics.py": ("test_every_question_about_everything_that_is_counted",),
    },
    "V29": {VALUES: ("test_v29_fusion",)},
    "V30": {
        "test_api_errors.py": ("test_a_bug_is_answered_and_logged_without_secrets",),
        REQUESTS: ("test_v30_a_message_is_read_by_nobody_as_a_page",),
    },
    "V31": {VALUES: ("test_v31_where_registries_are", "test_v31_challenges")},
    "V32": {VALUES: ("test_v32_what_buildkit_finds_logins_by",)},
    "V33": {"test_platform_keys.py": ("test_logins_come_out_as_they_went_in", "test_other_credentials_are_no_login")},
    "V34": {IDS: ("test_v34_keys_of_pairings_and_of_refreshed_tokens",)},
    "V36": {"test_statuses.py": ("test_the_status",), REQUESTS: ("test_v36_the_states_of_a_build",)},
}


def names_in(file: str) -> set[str]:
    """The names of a file's tests."""
    nodes = ast.walk(ast.parse((TESTS / file).read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("vector", VECTORS)
def test_a_vector_has_its_tests(vector: str) -> None:
    for file, names in VECTORS[vector].items():
        assert set(names) <= names_in(file), file


def test_every_api_vector_is_here() -> None:
    numbers = {*range(1, 25), *range(28, 37)} - {35}
    assert set(VECTORS) == {f"V{number}" for number in numbers}
