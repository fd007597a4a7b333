use serde_json::json;

use super::*;
use crate::top::rows::tests::process;

const NOW: &str = "2026-11-27T14:03:10+00:00[UTC]";

fn now() -> ZonedDateTime {
    NOW.parse().unwrap()
}

fn at(text: &str) -> Timestamp {
    format!("2026-11-27T{text}Z").parse().unwrap()
}

fn snapshot(taken: &str, wanted: Option<&str>) -> Snapshot {
    Snapshot {
        at: Some(at(taken)),
        wanted: wanted.map(at),
        processes: vec![
            process("nginx", Some(20), 5.0, "www", None),
            process("postgres", Some(10), 50.0, "postgres", None),
        ],
        total: 2,
        explained: None,
        values: None,
        sparkline: Vec::new(),
        vm: None,
    }
}

fn state() -> State {
    let vm = json!({ "instance_id": "vm-1", "name": "web", "hypervisor": "lab", "state": "running", "agent": "reporting",
        "last_report_at": null, "sample": null, "hypervisor_sample": null, "cpu_sparkline": [] });
    let mut state = State::new(serde_json::from_value(vm).unwrap());
    state.loaded(Load::Live, Ok(Some(snapshot("14:03:05", None))));
    state
}

fn press(state: &mut State, code: KeyCode) -> Outcome {
    state.press(KeyEvent::new(code, KeyModifiers::NONE), &now())
}

fn enter(state: &mut State, text: &str) {
    for char in text.chars() {
        press(state, KeyCode::Char(char));
    }
}

#[test]
fn arrows_step_through_the_past_and_back() {
    let mut state = state();
    let back = Load::Before(at("14:03:05"));
    assert_eq!(press(&mut state, KeyCode::Left), Outcome::Load(back));
    state.loaded(back, Ok(Some(snapshot("14:02:50", Some("14:02:50")))));
    assert!(!state.is_live);
    // The next table is known, because the user came from there.
    let known = Outcome::Load(Load::At(at("14:03:05")));
    assert_eq!(press(&mut state, KeyCode::Right), known);
    // Of any other table it is unknown; the last interval is where the search begins.
    state.loaded(
        Load::At(at("13:00:00")),
        Ok(Some(snapshot("12:59:55", Some("13:00:00")))),
    );
    let unknown = Load::After(at("12:59:55"), SignedDuration::from_secs(15));
    assert_eq!(press(&mut state, KeyCode::Right), Outcome::Load(unknown));
    let earlier = Outcome::Load(Load::At(at("12:50:00")));
    assert_eq!(press(&mut state, KeyCode::Char('<')), earlier);
    assert_eq!(press(&mut state, KeyCode::Char('l')), Outcome::Load(Load::Live));
    state.loaded(Load::Live, Ok(Some(snapshot("14:03:05", None))));
    assert_eq!(press(&mut state, KeyCode::Right), Outcome::Nothing);
    assert_eq!(press(&mut state, KeyCode::Char('>')), Outcome::Load(Load::Live));
}

#[test]
fn failed_load_keeps_what_is_shown() {
    let mut state = state();
    state.loaded(Load::Before(at("14:03:05")), Ok(None));
    assert!(state.is_live && state.rows.len() == 2);
    assert!(state.message.as_ref().unwrap().contains("no earlier processes"));
    state.loaded(Load::Live, Err(CliError::Timeout("https://a.example".to_owned())));
    assert_eq!(
        state.message.as_deref(),
        Some("https://a.example did not answer in time")
    );
    press(&mut state, KeyCode::Down);
    assert_eq!(state.message, None);
}

#[test]
fn at_sign_asks_for_a_moment_and_refuses_other_texts() {
    let mut state = state();
    enter(&mut state, "@noon");
    assert_eq!(press(&mut state, KeyCode::Enter), Outcome::Nothing);
    assert!(state.message.as_ref().unwrap().starts_with("\"noon\" is no time"));
    for _ in 0..4 {
        press(&mut state, KeyCode::Backspace);
    }
    enter(&mut state, "yesterday 14:03");
    let yesterday = "2026-11-26T14:03:00Z".parse().unwrap();
    assert_eq!(
        press(&mut state, KeyCode::Enter),
        Outcome::Load(Load::At(yesterday))
    );
    assert_eq!(state.mode, Mode::Table);
    enter(&mut state, "@now");
    assert_eq!(press(&mut state, KeyCode::Enter), Outcome::Load(Load::Live));
    enter(&mut state, "@q");
    assert_eq!(press(&mut state, KeyCode::Esc), Outcome::Nothing);
    assert_eq!(state.mode, Mode::Table);
}

#[test]
fn selected_row_is_kept_when_the_order_changes() {
    let mut state = state();
    press(&mut state, KeyCode::Down);
    assert_eq!(state.selected().unwrap().name, "postgres");
    press(&mut state, KeyCode::Char('c'));
    assert_eq!(state.table.selected(), Some(1), "the order is reversed");
    assert_eq!(state.selected().unwrap().name, "postgres");
    press(&mut state, KeyCode::PageDown);
    assert_eq!(state.table.selected(), Some(1), "the last row stays selected");
    enter(&mut state, "/NGI");
    assert_eq!((state.rows.len(), state.selected()), (1, None));
    press(&mut state, KeyCode::Esc);
    assert_eq!(state.rows.len(), 2, "Esc restores the filter before");
    enter(&mut state, "/none");
    press(&mut state, KeyCode::Enter);
    press(&mut state, KeyCode::End);
    assert_eq!(state.selected(), None);
}

#[test]
fn q_and_control_c_quit_but_not_while_text_is_entered() {
    let mut state = state();
    assert_eq!(press(&mut state, KeyCode::Char('q')), Outcome::Quit);
    enter(&mut state, "/q");
    assert_eq!(state.view.filter, "q");
    let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(state.press(control_c, &now()), Outcome::Quit);
}
