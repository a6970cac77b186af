"""`python -m deploy.cluster_files` writes files that the cluster's own checks accept, and overwrites none."""

from pathlib import Path

import pytest

from deploy.cluster_files.__main__ import main

ROOT = Path(__file__).parents[4]


def test_the_files_are_those_of_the_tree(tmp_path, capsys):
    folder = tmp_path / "cluster"
    assert main([str(folder)]) == 0
    written = {Path(line).relative_to(folder) for line in capsys.readouterr().out.splitlines()[:-1]}
    manifests = {file for file in (ROOT / "deploy/kubernetes").rglob("*") if file.is_file()}
    of_deploy = {file.relative_to(ROOT / "deploy") for file in manifests}
    of_deploy |= {Path("serve_config.yaml"), Path("Dockerfile"), Path("constraints-cuda.txt")}
    of_root = {Path("ray_cluster.yaml"), Path("constraints.txt")}
    assert written == of_deploy | of_root
    for path in of_deploy:
        assert (folder / path).read_text() == (ROOT / "deploy" / path).read_text()
    for path in of_root:
        assert (folder / path).read_text() == (ROOT / path).read_text()


def test_a_change_of_the_serve_config_reaches_kubernetes_too(tmp_path):
    main([str(tmp_path)])
    (tmp_path / "serve_config.yaml").write_text("applications: []\n")
    assert (tmp_path / "kubernetes/rayservice/serve_config.yaml").read_text() == "applications: []\n"


def test_a_file_that_is_there_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "serve_config.yaml").write_text("mine: 1\n")
    assert main([str(tmp_path)]) == 3
    assert "serve_config.yaml exists" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["serve_config.yaml"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    """This used to be a traceback."""
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/below"):
        assert main([str(tmp_path / folder)]) == 3
        message = capsys.readouterr().err
        assert "cannot be written" in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--hlep"], "did you mean --help?"), ([], "FOLDER must be given")]
)
def test_a_wrong_command_line_exits_with_3(arguments, said, capsys):
    """The status used to be 2, which in every other command means that too many rows failed."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 3
    assert said in capsys.readouterr().err
