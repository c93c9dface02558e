//! The native part of the npm package: handles of the core's sessions, mutexes and holds, and a post
//! box through which their results reach the event loop. What users see is in `index.js`.

mod handles;
mod held;
mod post;
