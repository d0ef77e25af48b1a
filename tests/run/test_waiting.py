"""A node that waits for others logs it once, and status.json is `waiting` until it trains."""

from ptune_dist.run.shared_pen import SharedPen
from ptune_dist.run.status import mark_node_running, read_status
from ptune_dist.run.waiting import Waiting


def test_it_is_said_once_and_is_in_status_json_meanwhile(tmp_path):
    lines: list[str] = []
    pens = [SharedPen(), SharedPen()]
    pens[0].take()
    writer, other = (Waiting(tmp_path, pen, lines.append) for pen in pens)
    for _ in range(3):
        other.look(2)
    assert lines == ["waits for 2 more nodes (train.min_nodes)"] and not read_status(tmp_path)
    writer.look(0)
    assert not read_status(tmp_path)
    for _ in range(2):
        writer.look(1)
    assert lines[1:] == ["waits for 1 more node (train.min_nodes)"]
    assert read_status(tmp_path)["state"] == "waiting" and read_status(tmp_path)["reason"] == lines[1]
    writer.end()
    assert read_status(tmp_path)["state"] == "running" and not read_status(tmp_path)["reason"]


def test_the_status_of_a_node_says_that_it_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("PTUNE_NODE_NAME", "2 (host)")
    folder = tmp_path / "launchers" / "2-host"
    mark_node_running(tmp_path)
    assert not folder.exists()  # without a launcher
    monkeypatch.setenv("PTUNE_NODE_FOLDER", str(tmp_path))
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"state": "starting", "restarts": 2}')
    mark_node_running(tmp_path)
    status = read_status(folder)
    assert status["state"] == "running" and status["restarts"] == 2
