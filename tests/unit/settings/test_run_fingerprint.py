"""If the digest of the same settings changed, no run that an earlier version began could resume."""

from blip2_actor import EngineConfig, GenerationOptions, ImageLimits
from blip2_actor.testing import FakeEngineConfig
from pipeline.column_names import SCHEMA_VERSION
from pipeline.inputs.reader import ReadOptions
from pipeline.settings.fingerprint import Fingerprint
from pipeline.settings.from_dict import from_dict
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.outputs import Outputs

INFO = FakeEngineConfig().info()
LIST_IN_ADDED_LATER = "a new field changes the digest of old runs: list it in fingerprint.ADDED_LATER"


def fingerprint(schema_version: int = SCHEMA_VERSION, **changes) -> Fingerprint:
    settings = CaptionSettings(input=("in",), output="out", **changes)
    return settings.in_version(schema_version).fingerprint(INFO)


def test_the_digests_of_version_0_1_0_are_frozen():
    everything = fingerprint(
        schema_version=1,
        format="parquet",
        limit=7,
        prompt="a photo of",
        outputs=Outputs.of({"color": "what color?"}, {"v": "queries"}, {"fit": "caption"}, regenerate=True),
        reading=ReadOptions(image_column="jpg", key_column="id", keep=("url",)),
        limits=ImageLimits(max_pixels=1000, jpeg_draft=True),
        generation=GenerationOptions(num_beams=3, stop=("x",)),
    )
    assert (
        fingerprint(schema_version=1).digest
        == "42a65d18ac79f76eee8e788c6ecf6aa1bf6d87a611759ab300f2e206e5fe887a"
    ), LIST_IN_ADDED_LATER
    assert everything.digest == "aad82fd6149fdf3d1b40716130bc76e9a91ff600d614abdc0d11cfbf0797d9f2", (
        LIST_IN_ADDED_LATER
    )


def test_rows_of_another_version_of_the_contract_have_another_digest():
    assert fingerprint().differences(fingerprint(schema_version=1)) == ["schema.version: 1 -> 2"]


def test_a_later_field_enters_the_digest_only_with_another_value_than_before():
    before = Fingerprint.of({"prompt": None, "options": {"num_beams": 1}}, {})
    added_later = {"options.diversity_penalty": 0.0, "image.crop": [], "image": {}}

    def now(diversity_penalty: float, crop: tuple[int, ...] = ()) -> Fingerprint:
        options = {"num_beams": 1, "diversity_penalty": diversity_penalty}
        image = {"crop": crop} if crop else {}
        return Fingerprint.of({"prompt": None, "options": options, "image": image}, added_later)

    assert now(0.0) == before
    assert now(0.0).digest == before.digest
    assert now(0.5).differences(before) == ["options.diversity_penalty: nothing -> 0.5"]
    assert now(0.0, crop=(1, 2)).differences(before) == ["image.crop: nothing -> [1, 2]"]


def test_accepting_truncated_images_changes_the_fingerprint_and_is_stored():
    accepting = ImageLimits(accept_truncated=True)
    differences = fingerprint(limits=accepting).differences(fingerprint())
    assert differences == ["image.accept_truncated: nothing -> True"]
    settings = CaptionSettings(input=("in",), output="out", limits=accepting)
    assert from_dict(CaptionSettings, settings.to_dict()) == settings


def test_quantization_changes_the_fingerprint_and_is_stored():
    quantized = EngineConfig(model="demo", quantize="int8")
    assert fingerprint(engine=quantized).differences(fingerprint()) == ["quantize: nothing -> 'int8'"]
    settings = CaptionSettings(input=("in",), output="out", engine=quantized)
    assert from_dict(CaptionSettings, settings.to_dict()) == settings
    assert "quantize" not in CaptionSettings(input=("in",), output="out").to_dict()["engine"]


def test_the_first_entry_of_a_mapping_is_one_difference():
    """The empty mapping before it used to be another one: `outputs.ask: {} -> nothing`."""
    asking = fingerprint(outputs=Outputs.of({"color": "what color?"}, None, None))
    changed = [
        "outputs.ask.color: nothing -> 'what color?'",
        "outputs.columns: ['caption'] -> ['caption', 'color']",
    ]
    assert asking.differences(fingerprint()) == changed


def test_an_entry_of_that_name_elsewhere_stays():
    parts = {"options": {"seed": 0}, "seed": 0}
    assert Fingerprint.of(parts, {"seed": 0}).parts == {"options": {"seed": 0}}


def test_every_output_is_in_the_fingerprint_and_what_only_saves_work_is_not():
    plain = fingerprint()
    assert fingerprint(reuse_identical=True) == plain
    asked = fingerprint(outputs=Outputs(ask=("color=what?",)))
    assert "outputs.ask.color: nothing -> 'what?'" in asked.differences(plain)
    digests = {
        fingerprint(outputs=outputs).digest
        for outputs in (
            Outputs(),
            Outputs(regenerate=True),
            Outputs(ask=("a=x", "b=y")),
            Outputs(ask=("b=y", "a=x")),
            Outputs(embed=("a=vision",)),
            Outputs(embed=("a=queries",)),
            Outputs(caption=False, embed=("a=vision",)),
            Outputs(score=("a=caption",)),
            Outputs(score=("a=alt",)),
        )
    }
    assert len(digests) == 9
