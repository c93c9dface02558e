//! The native half of the Python package `etcdlock`: arguments in, results and errors out. What
//! locks mean is in the crate `etcdlock`.

mod asynchronous;
mod errors;
mod events;
mod handles;
mod lifetime;
mod waiting;

use pyo3::prelude::*;

/// The native half of the package etcdlock. Import etcdlock instead.
#[pymodule(gil_used = false)]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::_command;
    #[pymodule_export]
    use crate::asynchronous::{_connect, Call};
    #[pymodule_export]
    use crate::errors::_error_kinds;
    #[pymodule_export]
    use crate::events::_next_event;
    #[pymodule_export]
    use crate::handles::{Contender, Hold, Mutex, Session, Stats, connect};
    #[pymodule_export]
    use crate::lifetime::_at_exit;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::lifetime::refuse_sub_interpreter()?;
        module.add("__version__", etcdlock::VERSION)?;
        super::start(module.py())
    }
}

/// The command etcdlock, for `python -m etcdlock`: runs the arguments (without the program's name) and
/// returns the exit code.
#[pyfunction]
fn _command(py: Python<'_>, args: Vec<String>) -> i32 {
    lifetime::detached(py, || etcdlock_cli::run(std::iter::once("etcdlock".to_owned()).chain(args).map(Into::into)))
}

fn start(py: Python<'_>) -> PyResult<()> {
    lifetime::watch_forks();
    events::listen();
    py.import("atexit")?.call_method1("register", (pyo3::wrap_pyfunction!(lifetime::_at_exit, py)?,))?;
    Ok(())
}
