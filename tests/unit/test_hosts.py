"""Several hosts in one process: an engine over a leading runner, and followers that must repeat its steps."""

import contextlib
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from jaxserve.distributed.follower import Follower, Leader
from jaxserve.distributed.leader import Followers, LeadingRunner
from jaxserve.distributed.messages import Channel
from jaxserve.request import AdapterSource
from jaxserve.runner_protocol import LoadedAdapter
from jaxserve.step import Plans, StepOutput
from tests.support.fakes import FakeRunner, FakeStep, make_engine, shift_adapter
from tests.unit.test_engine import finish, request, tokens

WAIT_S = 30.0


class HeldStep(FakeStep):
    """A step whose result is available once the runner's gate is open."""

    def result(self) -> tuple[StepOutput | None, ...]:
        assert isinstance(self._runner, HeldRunner)
        assert self._runner.gate.wait(WAIT_S)
        return super().result()


class HeldRunner(FakeRunner):
    """A runner that puts every forward pass into `sent` and holds its results until `gate` is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.sent: queue.SimpleQueue[Plans] = queue.SimpleQueue()

    def forward(self, plans: Plans) -> FakeStep:
        step = super().forward(plans)
        self.sent.put(plans)
        return HeldStep(self, plans, step._outputs)


def read_shift(folder: str) -> LoadedAdapter:
    return shift_adapter(len(folder))


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = socket.create_connection(listener.getsockname())
        return listener.accept()[0], there


def hang_up(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # hung up already
        end.shutdown(socket.SHUT_RDWR)
    end.close()


class Hosts:
    """Host 0 and the other hosts, each with its own runner.

    Attributes:
        losses: the reasons for which host 0 gave up.
    """

    def __init__(self, *runners: FakeRunner, leading: FakeRunner | None = None) -> None:
        pairs = [tcp_pair() for _ in runners]
        self.losses: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.losses_there: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.sockets = [end for pair in pairs for end in pair]
        self.channels = [Channel(there) for _, there in pairs]
        self.followers = Followers([Channel(here) for here, _ in pairs], self.losses.put)
        self.threads = [
            threading.Thread(target=Follower(runner, Leader(channel, self.losses_there.put)).run, daemon=True)
            for runner, channel in zip(runners, self.channels, strict=True)
        ]
        for thread in self.threads:
            thread.start()
        self.engine, self.runner = make_engine(
            wrap=lambda runner: LeadingRunner(leading or runner, self.followers), num_slots=2, read=read_shift
        )

    def finish(self) -> None:
        """Release the followers, and check that they end."""
        self.followers.finish()
        for thread in self.threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()


@pytest.fixture
def make_hosts() -> Iterator[Callable[..., Hosts]]:
    made: list[Hosts] = []

    def make(*runners: FakeRunner, leading: FakeRunner | None = None) -> Hosts:
        made.append(Hosts(*runners, leading=leading))
        return made[-1]

    yield make
    for hosts in made:
        for end in hosts.sockets:
            hang_up(end)


def test_three_hosts_run_the_same_steps(make_hosts: Callable[..., Hosts]) -> None:
    others = FakeRunner(), FakeRunner()
    hosts = make_hosts(*others)
    for name in ("a", "b"):
        hosts.engine.add(request(name, max_tokens=9))
    deltas = finish(hosts.engine)
    assert tokens(deltas, "a") == tokens(deltas, "b") == list(range(4, 13))
    hosts.finish()
    for other in others:
        assert other.plans == hosts.runner.plans
    assert hosts.losses.empty()
    assert hosts.losses_there.empty()


def test_min_over_hosts_waits_for_all_hosts() -> None:
    """Hosts meet twice, since the second meeting must not use values left from the first."""
    pairs = [tcp_pair() for _ in range(2)]
    losses: queue.SimpleQueue[str] = queue.SimpleQueue()
    followers = Followers([Channel(here) for here, _ in pairs], losses.put)
    first, second = (Leader(Channel(there), losses.put) for _, there in pairs)
    with ThreadPoolExecutor() as pool:
        for values in ([5, 3, 4], [2, 9, 1]):
            early = [pool.submit(followers.min_over_hosts, values[0]), pool.submit(first.min_over_hosts, values[1])]
            assert not wait(early, 0.1).done
            early.append(pool.submit(second.min_over_hosts, values[2]))
            assert [future.result(WAIT_S) for future in early] == [min(values)] * 3
    assert losses.empty()
    followers.finish()
    for pair in pairs:
        for end in pair:
            hang_up(end)


def test_an_abort_in_flight_is_repeated(make_hosts: Callable[..., Hosts]) -> None:
    other = FakeRunner()
    hosts = make_hosts(other)
    hosts.engine.add(request("a", max_tokens=50))
    hosts.engine.add(request("b", max_tokens=5))
    for _ in range(3):
        hosts.engine.step()
    hosts.engine.abort("a")
    assert tokens(finish(hosts.engine), "b")[-1] == 8
    hosts.finish()
    assert other.plans == hosts.runner.plans
    assert hosts.losses.empty()


def test_adapters_are_sent_to_the_others(make_hosts: Callable[..., Hosts], monkeypatch: pytest.MonkeyPatch) -> None:
    """The arrays of an adapter are sent in parts, also after a step that raised."""
    monkeypatch.setattr("jaxserve.distributed.adapters._PART_BYTES", 3)
    others = FakeRunner(), FakeRunner()
    hosts = make_hosts(*others)
    for key, folder in (("a", "x"), ("b", "xxx")):
        for runner in (hosts.runner, *others):
            runner.fail_next = 1
        hosts.engine.add(request(f"before {key}"))
        hosts.engine.load_adapter(AdapterSource(key=key, folder=folder), lambda error: None)
        finish(hosts.engine)
        hosts.engine.add(request(key, adapter=key))
        assert tokens(finish(hosts.engine), key)[0] == 4 + len(folder)
    hosts.engine.unload_adapter("a", lambda error: None)
    finish(hosts.engine)
    hosts.finish()
    for other in others:
        [(key, (leaves, digest))] = other.adapters.items()
        assert (key, digest, leaves["shift",].shape) == ("b", shift_adapter(3).digest, ())
    assert hosts.losses.empty()
    assert hosts.losses_there.empty()


def test_a_step_that_raises_everywhere_is_started_over(make_hosts: Callable[..., Hosts]) -> None:
    others = FakeRunner(), FakeRunner()
    hosts = make_hosts(*others)
    for runner in (hosts.runner, *others):
        runner.fail_next = 2  # a step and the first reset
    hosts.engine.add(request("a"))
    assert tokens(finish(hosts.engine), "a") == [4, 5, 6, 7]
    hosts.finish()
    assert [other.num_resets for other in others] == [2, 2]
    assert hosts.losses.empty()


def test_a_host_that_fails_alone_is_given_up(make_hosts: Callable[..., Hosts], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxserve.distributed.leader._NOTICE_S", 0.1)
    other = FakeRunner()
    hosts = make_hosts(FakeRunner(), other)
    other.fail_next = 1
    hosts.engine.add(request("a"))
    hosts.engine.step()
    assert hosts.losses.get(timeout=WAIT_S) == "host 2 failed in step 0: RuntimeError: the device is on fire"


class FailingStep(FakeStep):
    """A step whose failure is reported when its tokens are fetched, as devices do."""

    def result(self) -> tuple[StepOutput | None, ...]:
        assert isinstance(self._runner, FailingRunner)
        if self._runner.failures:
            self._runner.failures -= 1
            raise RuntimeError("the device is on fire")
        return super().result()


class FailingRunner(FakeRunner):
    """A runner whose first step raises when its tokens are fetched."""

    failures = 1

    def forward(self, plans: Plans) -> FakeStep:
        return FailingStep(self, plans, super().forward(plans)._outputs)


def test_tokens_that_raise_everywhere_are_started_over(make_hosts: Callable[..., Hosts]) -> None:
    others = FailingRunner(), FailingRunner()
    hosts = make_hosts(*others, leading=FailingRunner())
    hosts.engine.add(request("a"))
    assert tokens(finish(hosts.engine), "a") == [4, 5, 6, 7]
    hosts.finish()
    assert [other.num_resets for other in others] == [1, 1]
    assert hosts.losses.empty()


def test_tokens_that_raise_on_one_host_end_all(
    make_hosts: Callable[..., Hosts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxserve.distributed.leader._NOTICE_S", 0.1)
    hosts = make_hosts(FailingRunner())
    hosts.engine.add(request("a"))
    finish(hosts.engine)
    assert hosts.losses.get(timeout=WAIT_S) == "host 1 failed in step 0: RuntimeError: the device is on fire"


class StuckRunner(FailingRunner):
    """A failing runner whose reset waits until the gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def reset(self) -> None:
        assert self.gate.wait(WAIT_S)


def test_a_reset_that_does_not_end_is_given_up(
    make_hosts: Callable[..., Hosts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxserve.distributed.leader._RESET_S", 0.1)
    stuck = StuckRunner()
    hosts = make_hosts(FailingRunner(), leading=stuck)
    hosts.engine.add(request("a"))
    engine = threading.Thread(target=finish, args=(hosts.engine,))
    engine.start()
    assert "did not complete a reset in time" in hosts.losses.get(timeout=WAIT_S)
    stuck.gate.set()
    engine.join()


def test_a_host_that_draws_other_tokens_is_given_up(make_hosts: Callable[..., Hosts]) -> None:
    hosts = make_hosts(FakeRunner(), FakeRunner(vocab_size=5))
    hosts.engine.add(request("a"))
    finish(hosts.engine)
    # Either of the two followers may be reported first.
    assert "sampled different tokens in step 1" in hosts.losses.get(timeout=WAIT_S)


def test_a_host_that_is_lost_is_given_up(make_hosts: Callable[..., Hosts]) -> None:
    hosts = make_hosts(FakeRunner(), FakeRunner())
    hosts.sockets[3].shutdown(socket.SHUT_RDWR)
    assert hosts.losses.get(timeout=WAIT_S) == "host 2 is lost: the other host closed the connection"
    assert hosts.losses_there.get(timeout=WAIT_S) == "host 0 is lost: the other host closed the connection"


def test_host_0_that_is_lost_ends_the_others(make_hosts: Callable[..., Hosts]) -> None:
    hosts = make_hosts(FakeRunner(), FakeRunner())
    for end in hosts.sockets[::2]:
        end.shutdown(socket.SHUT_RDWR)
    for _ in range(2):
        assert hosts.losses_there.get(timeout=WAIT_S) == "host 0 is lost: the other host closed the connection"


def test_digests_from_before_a_reset_are_ignored(make_hosts: Callable[..., Hosts]) -> None:
    hosts = make_hosts(FakeRunner())
    hosts.followers.reset(3)
    hosts.followers.compare(2, 17, rank=1)
    hosts.followers.compare(2, 18)
    assert hosts.losses.empty()
    hosts.followers.compare(4, 17, rank=1)
    hosts.followers.compare(4, 18)
    assert "step 4" in hosts.losses.get(timeout=WAIT_S)


def test_a_follower_sends_the_next_step_while_one_runs(make_hosts: Callable[..., Hosts]) -> None:
    other = HeldRunner()
    hosts = make_hosts(other)
    hosts.engine.add(request("a"))
    hosts.engine.step()
    hosts.engine.step()
    # Both steps are on the devices before the first has ended.
    for _ in range(2):
        other.sent.get(timeout=WAIT_S)
    other.gate.set()
    finish(hosts.engine)
    hosts.finish()
    assert hosts.losses.empty()


def test_channel_enables_tcp_keepalive() -> None:
    end, there = tcp_pair()
    with end, there:
        Channel(end)
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        assert [end.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [1, 1, 3, 4000]


def test_follower_with_an_invalid_message_is_lost(make_hosts: Callable[..., Hosts]) -> None:
    hosts = make_hosts(FakeRunner())
    hosts.channels[0].send_encoded(b"\x00\x00\x00\x01\xc1")
    assert "host 1 is lost: not a message" in hosts.losses.get(timeout=WAIT_S)
