//! Tests with a real database, a real Alertmanager and a real mail server.

mod delivery;
mod failures;
mod making;
mod peers;
mod scene;
mod texts;
