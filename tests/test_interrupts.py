"""A signal sets a flag and nothing more; whoever looks at the flag stops between two things, not within one."""

from __future__ import annotations

import multiprocessing
import os
import signal

import lightning.pytorch as pl
import pytest
from helpers.tiny import digits_data, fit, ncsn

from lit_diffusion import interrupts
from lit_diffusion.errors import UserError


@pytest.fixture
def listening():
    before = {each: signal.getsignal(each) for each in interrupts.SIGNALS}
    interrupts.listen()
    yield
    interrupts.forget()
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_is_remembered_by_its_name(listening, name):
    assert interrupts.asked() is None
    os.kill(os.getpid(), getattr(signal, name))
    assert interrupts.asked() == name


def test_all_the_signals_are_there():
    assert {each.name for each in interrupts.SIGNALS} == {"SIGTERM", "SIGUSR1", "SIGINT"}
    assert interrupts.EXIT_CODE == 75


def test_ctrl_c_twice_ends_the_process_at_once(listening, capfd):
    os.kill(os.getpid(), signal.SIGINT)
    assert "Ctrl-C again to stop without saving" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_schedulers_signal_may_come_as_often_as_it_likes(listening, capfd):
    for name in ("SIGUSR1", "SIGTERM", "SIGTERM"):
        os.kill(os.getpid(), getattr(signal, name))
    assert interrupts.asked() == "SIGTERM"
    assert capfd.readouterr().err == ""
    with pytest.raises(KeyboardInterrupt):  # A person who is too impatient to wait for the saving.
        os.kill(os.getpid(), signal.SIGINT)


def test_a_forked_child_does_not_take_it_for_its_own(listening):
    child = os.fork()
    if child == 0:
        for each in interrupts.SIGNALS:
            os.kill(os.getpid(), each)
        os._exit(0 if interrupts.asked() is None else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert interrupts.asked() is None


def test_forget_gives_the_signals_back(listening):
    os.kill(os.getpid(), signal.SIGTERM)
    interrupts.forget()
    assert interrupts.asked() is None
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_stop_is_a_users_error_with_an_exit_code():
    stop = interrupts.Interrupted("why")
    assert isinstance(stop, UserError)
    assert (str(stop), stop.exit_code, stop.quiet) == ("why", 75, False)


class SignalTheWorkers(pl.Callback):
    """Sends a signal to the data workers after the second step, as a scheduler does to a whole group of processes."""

    def __init__(self):
        self.workers, self.alive = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.clock.steps == 2:
            self.workers = multiprocessing.active_children()
            for worker in self.workers:
                for each in interrupts.SIGNALS:
                    os.kill(worker.pid, each)
        self.alive.append([worker.is_alive() for worker in self.workers])


def test_a_data_worker_goes_on_working(tmp_path):
    method, watch = ncsn(), SignalTheWorkers()
    # Twenty steps, so that the worker must still answer after the batches that it had prepared.
    fit(method, digits_data(num_workers=1), tmp_path, 20 * 32, callbacks=[watch])
    assert method.clock.steps == 20
    assert len(watch.workers) == 1
    assert watch.alive[-1] == [True]
