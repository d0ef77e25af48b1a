"""How nodes find each other without a shared folder, and TLS between them."""

import pytest

from tests.nodes.nodes import Nodes
from tests.processes import free_port

pytestmark = pytest.mark.long


@pytest.mark.extended
def test_nodes_find_each_other_at_an_address(tmp_path):
    with Nodes(tmp_path, num_steps=60, block_s=0.01, rendezvous=f"127.0.0.1:{free_port()}") as nodes:
        nodes.start_all(*"abc")
        nodes.wait_for_step("a", 5)
        nodes.kill("b")
        nodes.wait_for_end("a", "c")
        nodes.check("a", "c")


@pytest.mark.extended
def test_the_node_that_serves_the_rendezvous_is_lost(tmp_path):
    with Nodes(tmp_path, num_steps=80, block_s=0.01, rendezvous=f"127.0.0.1:{free_port()}") as nodes:
        nodes.start_all(*"abc")
        assert any("serves" in event["text"] for event in nodes.events("a", "say"))
        nodes.wait_for_step("a", 5)
        nodes.kill("a")
        lost = nodes.last_step("b")
        nodes.wait_for_step("b", lost + 3)
        nodes.start("d")
        nodes.wait_until(lambda: nodes.events("d", "entered"))
        nodes.wait_for_end(*"bcd")
        nodes.check(*"bcd")
        assert not nodes.events("d", "entered")[0]["is_founder"]
        assert nodes.longest_pause("b") < 10


@pytest.mark.extended
def test_another_secret_is_refused_at_the_rendezvous(tmp_path):
    with Nodes(tmp_path, num_steps=400, block_s=0.01, rendezvous=f"127.0.0.1:{free_port()}") as nodes:
        nodes.start_all("a")
        nodes.start("b", secret="a different secret")
        nodes.wait_until(lambda: nodes.processes["b"].exitcode is not None)
        assert nodes.errors("b").startswith("error: node b is refused by node a: their secrets differ")


@pytest.mark.parametrize("where", [pytest.param("folder", marks=pytest.mark.extended), "address"])
def test_nodes_train_over_tls(tmp_path, certificates, where):
    rendezvous = {"rendezvous": f"127.0.0.1:{free_port()}"} if where == "address" else {}
    with Nodes(tmp_path, num_steps=20, min_nodes=2, **rendezvous) as nodes:
        for name in "ab":
            nodes.start(name, env={"PTUNE_TLS": str(certificates / "good")})
        nodes.wait_for_end(*"ab")
        nodes.check(*"ab")


@pytest.mark.extended
def test_a_node_with_a_certificate_of_another_authority_does_not_join(tmp_path, certificates):
    with Nodes(tmp_path, num_steps=20, min_nodes=2) as nodes:
        nodes.start("a", env={"PTUNE_TLS": str(certificates / "good")})
        nodes.wait_until(lambda: nodes.events("a", "entered"))
        nodes.start("b", env={"PTUNE_TLS": str(certificates / "other")})
        nodes.start("c")
        nodes.wait_until(
            lambda: all(any("TLS" in event["text"] for event in nodes.events(name, "say")) for name in "bc")
        )
        nodes.start("d", env={"PTUNE_TLS": str(certificates / "good")})
        nodes.wait_for_end("a", "d")
        entered = [event for name in "bc" for event in nodes.events(name, "entered")]
        assert all(event["step"] > 20 for event in entered)  # once the others had ended


def test_a_missing_certificate_is_named(tmp_path, certificates):
    (tmp_path / "empty").mkdir()
    with Nodes(tmp_path, num_steps=1) as nodes:
        nodes.start("a", env={"PTUNE_TLS": str(tmp_path / "empty")})
        nodes.wait_until(lambda: nodes.processes["a"].exitcode is not None)
        assert nodes.errors("a") == f"error: PTUNE_TLS: {tmp_path}/empty/ca.crt: No such file or directory\n"
