"""Work on several cores: results in order, errors where they are asked for, precision of the caller."""

import signal
import threading

import jax
import jax.numpy as jnp
import pytest

from neurobayes import _threads


@pytest.fixture(params=[1, 2], ids=["one core", "two cores"])
def cores(request, monkeypatch):
    monkeypatch.setattr(_threads.os, "cpu_count", lambda: request.param)
    return request.param


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("number", [0, 1, 2, 7])
def test_results_come_in_order(cores, number, compiled):
    found = _threads.side_by_side(lambda a, b: a - b, ((k, 1) for k in range(number)), compiled=compiled)
    assert found == [k - 1 for k in range(number)]


def test_the_first_runs_before_all_others(cores):
    done = []

    def note(k):
        assert k == 0 or 0 in done
        done.append(k)

    _threads.side_by_side(note, ((k,) for k in range(5)))
    assert sorted(done) == list(range(5))


def test_an_error_is_that_of_the_call(cores):
    with pytest.raises(ZeroDivisionError):
        _threads.side_by_side(lambda k: 1 // (k - 2), ((k,) for k in range(5)))


def test_beside_gives_its_result_or_error_when_asked(cores):
    assert _threads.beside(lambda: 3)() == 3
    failing = _threads.beside(lambda: 1 // 0)  # nothing is raised here
    with pytest.raises(ZeroDivisionError):
        failing()


def test_beside_runs_at_once_where_a_core_is_free(monkeypatch):
    monkeypatch.setattr(_threads.os, "cpu_count", lambda: 2)
    started = threading.Event()
    wanted = _threads.beside(started.set)
    assert started.wait(60)
    wanted()


def test_other_threads_have_the_precision_of_the_caller(cores):
    with jax.enable_x64(True):
        assert _threads.beside(lambda: jnp.ones(1).dtype)() == "float64"
        assert {str(d) for d in _threads.side_by_side(lambda k: jnp.ones(k).dtype, ((1,), (2,), (3,)))} == {"float64"}
    assert _threads.beside(lambda: jnp.ones(1).dtype)() == "float32"


class TestFollow:
    def test_results_come_in_order(self, cores):
        others = [lambda k=k: k for k in range(1, 6)]
        assert _threads.follow(lambda go: 0, others, pytest.fail, pytest.fail) == list(range(6))
        assert _threads.follow(lambda go: (go(), go())[0], others, pytest.fail, pytest.fail) == [None, 1, 2, 3, 4, 5]

    def test_the_others_wait_for_the_first(self):
        order = []

        def first(go):
            order.append("first")
            go()

        _threads.follow(first, [lambda: order.append("other")] * 3, pytest.fail, pytest.fail)
        assert order == ["first"] + 3 * ["other"]

    @pytest.mark.parametrize("which", [0, 1, 3])
    def test_an_error_ends_all(self, cores, which):
        ended = threading.Event()

        def run(k):
            if k == which:
                raise ZeroDivisionError
            assert k < which or ended.wait(60)  # those that run beside it are told to end

        with pytest.raises(ZeroDivisionError):
            others = [lambda k=k: run(k) for k in range(1, 5)]
            _threads.follow(lambda go: (go(), run(0)), others, pytest.fail, ended.set)
        assert ended.is_set()

    @pytest.mark.parametrize("first_ends", [False, True])
    def test_an_error_is_noticed_while_earlier_ones_run(self, monkeypatch, first_ends):
        monkeypatch.setattr(_threads.os, "cpu_count", lambda: 3)
        ended = threading.Event()

        def wait():
            assert ended.wait(20), "not told to end"

        def first(go):
            go()
            if not first_ends:
                wait()

        with pytest.raises(ZeroDivisionError):
            _threads.follow(first, [wait, lambda: 1 // 0], pytest.fail, ended.set)
        assert ended.is_set()

    def test_ctrl_c_interrupts_and_is_restored(self, cores):
        told = threading.Event()
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:

            def wait():
                signal.raise_signal(signal.SIGINT)
                return told.wait(60)

            assert _threads.follow(lambda go: "first", [wait], told.set, pytest.fail) == ["first", True]
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        finally:
            signal.signal(signal.SIGINT, before)

    def test_a_handler_of_the_program_stays(self, cores):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            found = _threads.follow(lambda go: signal.getsignal(signal.SIGINT), [], pytest.fail, pytest.fail)
            assert found == [signal.SIG_IGN]
        finally:
            signal.signal(signal.SIGINT, before)
