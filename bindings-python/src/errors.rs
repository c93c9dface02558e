//! Core's errors as exceptions of the module `etcdlock._errors`.

use etcdlock::{Error, ErrorKind};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

use crate::lifetime::before_an_error;

/// The exception classes in the order of the kinds' numbers.
static CLASSES: PyOnceLock<Vec<Py<PyType>>> = PyOnceLock::new();

/// The numbers and names of the error kinds, as core has them.
#[pyfunction]
pub(crate) fn _error_kinds() -> Vec<(i32, &'static str)> {
    ErrorKind::ALL.iter().map(|kind| (kind.code(), kind.name())).collect()
}

fn classes(py: Python<'_>) -> PyResult<&Vec<Py<PyType>>> {
    CLASSES.get_or_try_init(py, || py.import("etcdlock._errors")?.getattr("BY_CODE")?.extract())
}

/// The exception class of a kind.
pub(crate) fn exception_type<'py>(py: Python<'py>, kind: ErrorKind) -> PyResult<&'py Bound<'py, PyType>> {
    let class = classes(py)?.get(kind.code() as usize - 1);
    Ok(class.ok_or_else(|| PyRuntimeError::new_err("an error kind without its exception"))?.bind(py))
}

fn exception(py: Python<'_>, kind: ErrorKind, message: &str) -> PyErr {
    match exception_type(py, kind) {
        Ok(class) => PyErr::from_type(class.clone(), (message.to_owned(),)),
        Err(error) => error,
    }
}

pub(crate) fn raise(py: Python<'_>, error: &Error) -> PyErr {
    before_an_error(py);
    exception(py, error.kind(), error.message())
}

pub(crate) fn invalid(py: Python<'_>, message: impl AsRef<str>) -> PyErr {
    exception(py, ErrorKind::Invalid, message.as_ref())
}
