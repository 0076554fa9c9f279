//! Faults at the n-th system call of a real child, injected by strace: death, errors, lies and delays.
//!
//! ```text
//!   scenario ──traced once──▶ its calls that touch the journal ──▶ one trial per call and fault
//!   trial: strace -e inject=CALL:FAULT:when=N child ──▶ what it said, its trace ──▶ restart and check
//! ```
//! strace counts the calls of each thread apart, so the n-th call of every thread fails; after the first
//! failure that counts, none of the others may heal anything.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use crate::child::Plant;
use crate::driver::{Device, Ledger, Running, Said};
use crate::mounts::need;
use crate::{Plan, Reached, Stop};

/// The calls that change files or make them durable, under all their names.
const CALLS: &str = "write,pwrite64,pwritev,pwritev2,fdatasync,fsync,sync_file_range,openat,rename,renameat,\
                     renameat2,unlink,unlinkat,mkdir,mkdirat,ftruncate,fallocate,fadvise64";
/// Trials are made for the first so many of each.
const CALLS_MAX: usize = 200;
/// How many batches a child appends, over several segments.
const BATCHES: u64 = 30;

// -------------------------------------------------------------------------------------------- the scenarios

/// How a journal is before the child begins.
struct Scenario {
    name: &'static str,
    /// `None`: there is none.
    template: Option<Ledger>,
    writers: usize,
}

impl Scenario {
    fn all(plan: &Plan) -> Result<Vec<Self>, Stop> {
        let unclean = Some(unclean(plan)?);
        Ok(vec![
            Self { name: "created", template: None, writers: 1 },
            Self { name: "recovered", template: unclean, writers: 1 },
            Self { name: "four threads", template: None, writers: 4 },
        ])
    }

    fn prepare(&self, dir: &Path) -> Ledger {
        let store = dir.join("store");
        drop(std::fs::remove_dir_all(&store));
        match &self.template {
            Some(template) => template.copied_to(store),
            None => Ledger::new(store, self.writers),
        }
    }
}

/// A journal whose child was killed, with bytes behind its end that no batch begins with.
fn unclean(plan: &Plan) -> Result<Ledger, Stop> {
    let mut ledger = Ledger::new(plan.dir("calls").join("unclean"), 1);
    let mut running = ledger.start();
    running.hear_acknowledged(&mut ledger, 25);
    running.kill(&mut ledger);
    let journal = ledger.dir.join("journal");
    let segments: BTreeSet<PathBuf> = std::fs::read_dir(&journal)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|it| it == "seg"))
        .collect();
    let used = segments.into_iter().rfind(|path| is_used(path));
    let used = used.ok_or_else(|| Stop::Violated("no segment is used".into()))?;
    let mut bytes = std::fs::read(&used).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap().next_multiple_of(64);
    for byte in bytes.iter_mut().skip(end).take(300) {
        *byte = 0xa5;
    }
    std::fs::write(&used, bytes).unwrap();
    Ok(ledger)
}

/// Whether a segment has a header. Without one it is only prepared.
fn is_used(segment: &Path) -> bool {
    std::fs::read(segment).is_ok_and(|bytes| bytes.iter().take(4096).any(|byte| *byte != 0))
}

// ------------------------------------------------------------------------------------------------ the trace

/// A call as strace shows it.
#[derive(Debug)]
struct Call {
    thread: String,
    name: String,
    /// Which of its kind in its thread, from 1.
    number: usize,
    /// Everything behind the name.
    text: String,
    injected: bool,
}

impl Call {
    /// The path of the file it is on, if that is a segment.
    fn segment(&self) -> Option<PathBuf> {
        let path = self.text.split_once('<')?.1.split_once('>')?.0;
        path.ends_with(".seg").then(|| path.into())
    }
}

/// The calls in the order in which they ended; those that never did are left out.
fn read_trace(log: &Path) -> Vec<Call> {
    let mut begun: HashMap<String, String> = HashMap::new();
    let mut counts: HashMap<(String, String), usize> = HashMap::new();
    let mut calls = Vec::new();
    let bytes = std::fs::read(log).unwrap_or_default();
    for line in String::from_utf8_lossy(&bytes).lines() {
        let Some((thread, text)) = line.split_once(' ') else { continue };
        let text = text.trim_start();
        if let Some(first) = text.strip_suffix("<unfinished ...>") {
            begun.insert(thread.to_owned(), first.to_owned());
            continue;
        }
        let text = match text.split_once("resumed>") {
            Some((_, rest)) if text.starts_with("<... ") => {
                format!("{}{rest}", begun.remove(thread).unwrap_or_default())
            }
            _ => text.to_owned(),
        };
        let Some((name, text)) = text.split_once('(') else { continue };
        let number = counts.entry((thread.to_owned(), name.to_owned())).or_default();
        *number += 1;
        calls.push(Call {
            thread: thread.to_owned(),
            name: name.to_owned(),
            number: *number,
            injected: text.contains("(INJECTED)"),
            text: text.to_owned(),
        });
    }
    calls
}

// ------------------------------------------------------------------------------------------------ the trials

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Kill,
    Error(&'static str),
    /// From the n-th call on.
    Lasting(&'static str),
    Interrupted,
    /// The call isn't made and says that it has done nothing.
    Nothing,
    /// The call isn't made and says that it has written three bytes.
    Lie,
    Delay,
}

impl Fault {
    fn of(call: &str) -> &'static [Self] {
        const EIO: Fault = Fault::Error("EIO");
        const ENOSPC: Fault = Fault::Error("ENOSPC");
        const ALWAYS: Fault = Fault::Lasting("EIO");
        const NEVER_SPACE: Fault = Fault::Lasting("ENOSPC");
        match call {
            "write" => &[Fault::Kill],
            "pwrite64" => {
                const INTERRUPTED: Fault = Fault::Interrupted;
                &[Fault::Kill, EIO, ENOSPC, NEVER_SPACE, INTERRUPTED, Fault::Nothing, Fault::Lie]
            }
            "pwritev" | "pwritev2" => &[Fault::Kill, EIO, ENOSPC, Fault::Interrupted],
            "fdatasync" | "fsync" | "sync_file_range" => {
                &[Fault::Kill, EIO, ENOSPC, ALWAYS, Fault::Delay]
            }
            "openat" => &[Fault::Kill, EIO, Fault::Error("EMFILE")],
            _ => &[Fault::Kill, EIO, ENOSPC],
        }
    }

    fn inject(self, call: &str, number: usize) -> String {
        let what = match self {
            Self::Kill => "signal=SIGKILL".into(),
            Self::Error(error) | Self::Lasting(error) => format!("error={error}"),
            Self::Interrupted => "error=EINTR".into(),
            Self::Nothing => "retval=0".into(),
            Self::Lie => "retval=3".into(),
            Self::Delay => "delay_enter=20000".into(),
        };
        let on = if matches!(self, Self::Lasting(_)) { "+" } else { "" };
        format!("inject={call}:{what}:when={number}{on}")
    }
}

struct Trial<'a> {
    scenario: &'a Scenario,
    call: String,
    number: usize,
    fault: Fault,
}

/// What the trials have brought about.
#[derive(Debug, Default)]
struct Tally {
    struck: usize,
    killed: usize,
    unknown: usize,
    refused: usize,
    full: usize,
}

impl Trial<'_> {
    /// All that a traced run without a fault suggests.
    fn suggested<'a>(scenario: &'a Scenario, dir: &Path) -> Result<Vec<Trial<'a>>, Stop> {
        let mut ledger = scenario.prepare(dir);
        let log = dir.join("trace");
        let status = traced(&mut ledger, &log, None, BATCHES);
        if !ledger.heard(|said| *said == Said::Closed) {
            return Err(Stop::Skipped(format!("strace can't trace here: {status}")));
        }
        ledger.check(Device::Honest)?;
        let mut seen = HashSet::new();
        let mut trials = Vec::new();
        let dir = ledger.dir.to_str().unwrap();
        for call in read_trace(&log) {
            let ours = call.text.contains(dir) || call.name == "write";
            if ours && call.number <= CALLS_MAX && seen.insert((call.name.clone(), call.number)) {
                trials.extend(Fault::of(&call.name).iter().map(|fault| Trial {
                    scenario,
                    call: call.name.clone(),
                    number: call.number,
                    fault: *fault,
                }));
            }
        }
        Ok(trials)
    }

    fn run(&self, dir: &Path, tally: &mut Tally) -> Result<(), Stop> {
        self.try_it(dir, tally).map_err(|stop| match stop {
            Stop::Violated(what) => Stop::Violated(format!(
                "{what}; scenario {:?}, {}; trace: {}",
                self.scenario.name,
                self.fault.inject(&self.call, self.number),
                dir.join("trace").display()
            )),
            skipped @ Stop::Skipped(_) => skipped,
        })
    }

    fn try_it(&self, dir: &Path, tally: &mut Tally) -> Result<(), Stop> {
        let mut ledger = self.scenario.prepare(dir);
        let used_before = used_segments(&ledger.dir);
        let log = dir.join("trace");
        let inject = self.fault.inject(&self.call, self.number);
        let killed = traced(&mut ledger, &log, Some(&inject), BATCHES);
        let calls = read_trace(&log);
        tally.killed += usize::from(killed);
        tally.unknown += usize::from(ledger.heard(|said| *said == Said::Unknown));
        tally.refused += usize::from(ledger.heard(|said| matches!(said, Said::Refused { .. })));
        tally.full += usize::from(ledger.heard(|said| *said == Said::Full));
        tally.struck += usize::from(killed || calls.iter().any(|call| call.injected));
        self.judge(&ledger, &calls, used_before).map_err(Stop::Violated)?;
        let lies = self.fault == Fault::Lie && calls.iter().any(|call| call.injected);
        ledger.check(if lies { Device::Lies } else { Device::Honest })?;
        Ok(())
    }

    /// What the child must have said about the fault.
    fn judge(
        &self,
        ledger: &Ledger,
        calls: &[Call],
        mut used: HashSet<PathBuf>,
    ) -> Result<(), String> {
        let mut failed = false;
        let mut reserving = false;
        // The same number strikes in every thread: the mark that says "closed" may not be durable either,
        // and closing rightly says so.
        let mut elsewhere = false;
        // A segment that is full is cut in the background, behind everything that is durable in it: if that fails, or the sync
        // behind it, nothing is lost, and closing says so.
        let mut is_open = false;
        let mut cutting = HashSet::new();
        let mut uncut = false;
        for call in calls {
            let segment = call.segment();
            is_open |= call.text.contains("\"opened");
            if call.name == "ftruncate" && is_open {
                cutting.extend(segment.clone().map(|segment| (&call.thread, segment)));
            }
            let is_cut = |segment: &PathBuf| {
                matches!(call.name.as_str(), "ftruncate" | "fdatasync")
                    && cutting.contains(&(&call.thread, segment.clone()))
            };
            let is_cut = segment.as_ref().is_some_and(is_cut);
            if call.name.starts_with("pwrite")
                && !call.text.contains("\"\\0\\0\\0")
                && let Some(segment) = &segment
            {
                used.insert(segment.clone());
            }
            let makes_durable = call.name.starts_with("pwrite") || call.name == "fdatasync";
            let fails = call.injected
                && matches!(self.fault, Fault::Error(_) | Fault::Lasting(_) | Fault::Nothing);
            match segment {
                _ if is_cut => uncut |= fails,
                Some(segment) if fails && makes_durable && used.contains(&segment) => failed = true,
                Some(_) if fails && makes_durable => reserving = true,
                _ => elsewhere |= fails,
            }
            if failed && ledger.firsts.len() == 1 && call.text.contains("\"acknowledged") {
                return Err("acknowledged behind a failed write or sync".into());
            }
        }
        if uncut && ledger.heard(|said| *said == Said::Closed) {
            return Err("a segment could not be cut, and closing did not say so".into());
        }
        let opened = ledger.heard(|said| matches!(said, Said::Opened(_)));
        let unsettled =
            ledger.heard(|said| matches!(said, Said::Unknown | Said::Poisoned | Said::Unclosed));
        if failed && opened && !unsettled {
            return Err("a failed write or sync was not told".into());
        }
        let enospc = self.fault == Fault::Error("ENOSPC");
        if enospc && reserving && !failed && !elsewhere && !uncut && opened && unsettled {
            return Err("no space for the next segment is not only DiskFull".into());
        }
        let harmless = matches!(self.fault, Fault::Interrupted | Fault::Delay);
        if harmless && !ledger.heard(|said| *said == Said::Closed) {
            return Err(format!("not harmless: {:?}", ledger.said.last()));
        }
        Ok(())
    }
}

fn used_segments(dir: &Path) -> HashSet<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir.join("journal")) else { return HashSet::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|it| it == "seg") && is_used(path)).collect()
}

/// Runs a child under strace until it has ended; whether it was killed.
fn traced(ledger: &mut Ledger, log: &Path, inject: Option<&str>, batches: u64) -> bool {
    let trace = format!("trace={CALLS}");
    let mut strace = vec!["strace", "-f", "-y", "-qq", "-s", "16"];
    strace.extend(["-o", log.to_str().unwrap(), "-e", &trace]);
    if let Some(inject) = inject {
        strace.extend(["-e", inject]);
    }
    // Quicker, but some versions inject no signals with it.
    if inject.is_none_or(|inject| !inject.contains("signal=")) {
        strace.push("--seccomp-bpf");
    }
    let strace: Vec<String> = strace.into_iter().map(str::to_owned).collect();
    let mut running = Running::start(&ledger.orders(batches), &strace);
    let status = running.end(ledger);
    status.code().is_none()
}

pub(crate) fn run(plan: &Plan) -> Reached {
    need("strace")?;
    let dir = plan.dir("calls");
    let scenarios = Scenario::all(plan)?;
    let mut trials = Vec::new();
    for scenario in &scenarios {
        trials.extend(Trial::suggested(scenario, &dir)?);
    }
    let all = trials.len();
    // A soak makes them all.
    let mut rng = plan.rng();
    rng.shuffle(&mut trials);
    let budget = plan.budget(all, 40);
    let mut tally = Tally::default();
    let mut done = 0;
    while budget.allows(done)
        && let Some(trial) = trials.get(done)
    {
        trial.run(&dir, &mut tally)?;
        done += 1;
    }
    let Tally { struck, killed, unknown, refused, full } = tally;
    Ok(format!(
        "{done} of {all} trials ({struck} struck: {killed} killed, {unknown} appends unknown, {refused} \
         openings refused, {full} times full), 0 violations"
    ))
}

/// A child that is killed while it has claimed what it has not appended is convicted.
pub(crate) fn catches_a_lie(plan: &Plan) -> Reached {
    need("strace")?;
    let dir = plan.dir("calls-lie");
    for (trials, number) in (5..100).step_by(7).enumerate() {
        let mut ledger = Ledger::new(dir.join("store"), 1);
        drop(std::fs::remove_dir_all(&ledger.dir));
        ledger.plant = Some(Plant::ClaimTheNext);
        let inject = Fault::Kill.inject("pwrite64", number);
        if !traced(&mut ledger, &dir.join("trace"), Some(&inject), BATCHES) {
            return Err(Stop::Skipped("strace doesn't kill the child".into()));
        }
        match ledger.check(Device::Honest) {
            Ok(_) => {}
            Err(Stop::Violated(_)) => return Ok(format!("after {} kills", trials + 1)),
            Err(skipped) => return Err(skipped),
        }
    }
    Err(Stop::Violated("no kill has shown a child that claims what it has not done".into()))
}
