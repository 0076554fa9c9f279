//! Runs both services as processes, kills them, and checks what they say.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{BufRead, BufReader, IsTerminal, Lines, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use crate::events::{Purchase, read_purchases};
use crate::views::{MonthRow, TotalsRow};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Where the purchases are, seen from the crate's root.
const INPUT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/shop/data/CDNOW_master.txt");

/// Customers whose rows are shown: from a handful of purchases to hundreds.
const SHOWN: [u32; 4] = [3, 29, 7592, 14048];

/// One of our own processes.
struct Service {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Service {
    fn start(args: &[&str]) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().ok_or("no standard input")?;
        let output = BufReader::new(child.stdout.take().ok_or("no standard output")?).lines();
        Ok(Self { child, input, output })
    }

    /// The next line, split at spaces.
    fn line(&mut self) -> Result<Vec<String>> {
        let line = self.output.next().ok_or("the service ended unexpectedly")??;
        Ok(line.split(' ').map(str::to_owned).collect())
    }

    fn ask(&mut self, question: &str) -> Result<Vec<String>> {
        writeln!(self.input, "{question}")?;
        self.line()
    }

    /// Everything up to the line that begins with `end`.
    fn ask_all(&mut self, question: &str) -> Result<Vec<Vec<String>>> {
        writeln!(self.input, "{question}")?;
        let mut answers = Vec::new();
        loop {
            let line = self.line()?;
            let last = line.first().is_some_and(|word| word == "end");
            answers.push(line);
            if last {
                return Ok(answers);
            }
        }
    }

    /// SIGKILL: no handler runs, nothing is flushed.
    fn kill(mut self) -> Result<Vec<Vec<String>>> {
        self.child.kill()?;
        self.child.wait()?;
        let rest = self.output.map_while(std::result::Result::ok);
        Ok(rest.map(|line| line.split(' ').map(str::to_owned).collect()).collect())
    }

    /// Lets go, and waits for an orderly end.
    fn stop(self) -> Result<()> {
        let Self { mut child, input, output } = self;
        drop(input);
        output.for_each(drop);
        match child.wait()?.success() {
            true => Ok(()),
            false => Err("the service ended with an error".into()),
        }
    }
}

struct Demo {
    dir: PathBuf,
    address: String,
    /// Rows for the table at the end: what, and what came out.
    results: Vec<(String, String, bool)>,
    started: Instant,
}

pub(crate) fn run(dir: Option<PathBuf>) -> Result<()> {
    let keep = dir.is_some();
    let dir = dir.unwrap_or_else(|| {
        std::env::temp_dir().join(format!("headwater-demo-{}", std::process::id()))
    });
    std::fs::create_dir_all(&dir)?;
    let mut demo = Demo {
        dir: dir.clone(),
        address: "127.0.0.1:0".to_owned(),
        results: Vec::new(),
        started: Instant::now(),
    };
    let outcome = demo.play();
    demo.print_results();
    if keep || outcome.is_err() {
        println!("\nThe data is in {}.", dir.display());
    } else {
        std::fs::remove_dir_all(&dir)?;
    }
    outcome?;
    match demo.results.iter().all(|(_, _, agrees)| *agrees) {
        true => Ok(()),
        false => Err("something differs from what it should be".into()),
    }
}

impl Demo {
    fn play(&mut self) -> Result<()> {
        let purchases = read_purchases(Path::new(INPUT))?;
        let all = purchases.len();
        self.say(&format!("{all} purchases to record; both services start empty"));

        let mut orders = self.start_orders(0)?;
        let mut customers = self.start_customers()?;
        let mut acknowledged = follow_until(&mut orders, all, all * 3 / 10)?;
        customers_ready(&mut customers)?; // it has a mirror before its origin is killed

        self.say("SIGKILL to orders, while it writes");
        for line in orders.kill()? {
            acknowledged = acknowledged.max(appended(&line).unwrap_or(0));
        }
        self.check_down(&mut customers, acknowledged)?;

        let before = Instant::now();
        let mut orders = self.start_orders(acknowledged)?;
        follow_until(&mut orders, all, all * 4 / 10)?;
        wait_for_status(&mut customers, all * 4 / 10)?;
        self.note("customers has resumed with orders after", &ms(before.elapsed()), true);

        follow_until(&mut orders, all, all * 6 / 10)?;
        let status = customers.ask("status")?;
        self.say(&format!(
            "SIGKILL to customers, while it folds (at {} of {all})",
            word(&status, 2)
        ));
        customers.kill()?;
        let mut customers = self.start_customers()?;
        let resumed: usize = word(&customers_ready(&mut customers)?, 1).parse()?;
        self.note(
            "the killed view was durable up to position (the rest is folded again)",
            &resumed.to_string(),
            true,
        );

        wait_for_status(&mut customers, all * 6 / 10)?;
        self.check_rebuild(&mut customers)?;

        follow_until(&mut orders, all, all)?;
        let before = Instant::now();
        let status = wait_for_status(&mut customers, all)?;
        self.note("customers caught up after the last append in", &ms(before.elapsed()), true);
        self.check_end(&mut orders, &status, all)?;
        self.check_totals(&mut customers, &purchases)?;
        self.check_months(&mut customers, &purchases)?;
        customers.stop()?;
        orders.stop()?;
        self.check_view()?;
        self.check_files()
    }

    fn start_orders(&mut self, at_least: usize) -> Result<Service> {
        let dir = self.dir.join("orders");
        let mut orders = Service::start(&["orders", text(&dir)?, &self.address, INPUT])?;
        let line = orders.line()?;
        let recovered: usize = word(&line, 2).parse()?;
        self.address = word(&line, 1).to_owned();
        self.say(&format!("orders serves {} with {recovered} purchases", self.address));
        if at_least > 0 {
            let what =
                format!("orders has all {at_least} acknowledged purchases after its restart");
            self.note(&what, &format!("{recovered} recovered"), recovered >= at_least);
        }
        Ok(orders)
    }

    fn start_customers(&mut self) -> Result<Service> {
        let dir = self.dir.join("customers");
        self.say(&format!("customers follows {}", self.address));
        Service::start(&["customers", text(&dir)?, &self.address])
    }

    /// While the owner is down, the follower goes on answering.
    fn check_down(&mut self, customers: &mut Service, acknowledged: usize) -> Result<()> {
        let status = customers.ask("status")?;
        let row = customers.ask("get 3")?;
        let answered = word(&row, 0) == "row";
        self.say(&format!(
            "orders is down; customers answers from its own view: customer 3: {}",
            row[1..].join(" ")
        ));
        let behind = acknowledged.saturating_sub(word(&status, 1).parse()?);
        self.note(
            "customers answered while orders was down",
            &format!("{behind} purchases behind"),
            answered,
        );
        Ok(())
    }

    /// The view is built anew while it serves, and while `orders` goes on appending.
    fn check_rebuild(&mut self, customers: &mut Service) -> Result<()> {
        self.say("customers rebuilds its view while it serves, and while orders writes");
        let rebuilt = customers.ask("rebuild")?;
        let (old, new) = (word(&rebuilt, 1).to_owned(), word(&rebuilt, 2).to_owned());
        let answers: u64 = word(&rebuilt, 3).parse()?;
        let (slowest, took) = (word(&rebuilt, 4).parse()?, word(&rebuilt, 5).parse()?);
        let (slowest, took) = (Duration::from_micros(slowest), Duration::from_micros(took));
        let came = format!("{answers}, the slowest in {}", ms(slowest));
        let what = format!("answers during a rebuild of {}", ms(took));
        self.note(&what, &came, answers > 0 && old != new);
        let (served, built) = (word(&rebuilt, 7).to_owned(), word(&rebuilt, 8).to_owned());
        let position = word(&rebuilt, 6);
        let same = served == built && !built.is_empty();
        self.note(&format!("digest of generation 1.{old} at {position}"), &served, same);
        self.note(&format!("digest of generation 1.{new} at {position}"), &built, same);
        Ok(())
    }

    /// The command line proves that the view is what its history makes.
    fn check_view(&mut self) -> Result<()> {
        let dir = self.dir.join("customers");
        self.say("shop admin view check CUSTOMERS totals: builds the view again, and compares");
        let output = Command::new(std::env::current_exe()?)
            .args(["admin", "view", "check", text(&dir)?, "totals"])
            .stderr(Stdio::inherit())
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let came = text.trim().rsplit(": ").next().unwrap_or_default().to_owned();
        self.note("the view is what its journal makes", &came, output.status.success());
        Ok(())
    }

    /// Same chain at the same position: the same history.
    fn check_end(&mut self, orders: &mut Service, status: &[String], all: usize) -> Result<()> {
        let done = orders.line()?;
        let (ours, theirs) = (word(&done, 1).to_owned(), word(status, 4).to_owned());
        let same = ours == theirs && !ours.is_empty();
        self.note(&format!("chain of orders at {all}"), &ours, same);
        self.note(&format!("chain of its mirror at {}", word(status, 1)), &theirs, same);
        self.note("lag of the mirror, in events", word(status, 3), word(status, 3) == "0");
        Ok(())
    }

    fn check_totals(&mut self, customers: &mut Service, purchases: &[Purchase]) -> Result<()> {
        let mut recount: BTreeMap<u32, TotalsRow> = BTreeMap::new();
        for purchase in purchases {
            let row = recount.entry(purchase.customer).or_default();
            row.purchases += 1;
            row.cds += purchase.cds;
            row.spent_cents += purchase.amount_cents;
            row.last_date = row.last_date.max(purchase.date);
        }
        let mut answers = customers.ask_all("all")?;
        answers.pop();
        let mut found = BTreeMap::new();
        for line in &answers {
            let row = TotalsRow {
                purchases: word(line, 2).parse()?,
                cds: word(line, 3).parse()?,
                spent_cents: word(line, 4).parse()?,
                last_date: word(line, 5).parse()?,
            };
            found.insert(word(line, 1).parse()?, row);
        }
        for customer in SHOWN {
            let (Some(row), counted) = (found.get(&customer), recount.get(&customer)) else {
                continue;
            };
            let what = format!("customer {customer}: purchases, CDs, spent, last");
            let came = format!(
                "{}, {}, {}.{:02}, {}",
                row.purchases,
                row.cds,
                row.spent_cents / 100,
                row.spent_cents % 100,
                row.last_date
            );
            self.note(&what, &came, Some(row) == counted);
        }
        let what =
            format!("rows of the view that equal a recount of {} purchases", purchases.len());
        let equal =
            recount.iter().filter(|(customer, row)| found.get(*customer) == Some(*row)).count();
        let came = format!("{equal} of {}", recount.len());
        self.note(&what, &came, found == recount);
        Ok(())
    }

    fn check_months(&mut self, customers: &mut Service, purchases: &[Purchase]) -> Result<()> {
        self.say("a new view on old events: what was bought in each month");
        let mut recount: BTreeMap<u32, MonthRow> = BTreeMap::new();
        for purchase in purchases {
            let row = recount.entry(purchase.date / 100).or_default();
            row.purchases += 1;
            row.spent_cents += purchase.amount_cents;
        }
        let mut answers = customers.ask_all("months")?;
        let elapsed =
            answers.pop().and_then(|end| end.get(1)?.parse().ok()).map(Duration::from_micros);
        let mut found = BTreeMap::new();
        for line in &answers {
            let row =
                MonthRow { purchases: word(line, 2).parse()?, spent_cents: word(line, 3).parse()? };
            found.insert(word(line, 1).parse()?, row);
        }
        let agrees = found == recount;
        let what = format!("new view over {} old events, {} months", purchases.len(), found.len());
        self.note(&what, &elapsed.map_or("?".to_owned(), ms), agrees);
        Ok(())
    }

    /// The mirror's files are the origin's files.
    fn check_files(&mut self) -> Result<()> {
        let origin = self.dir.join("orders/journal");
        let mirror = self.dir.join("customers/mirrors/orders/journal");
        let mut names: Vec<_> = std::fs::read_dir(&mirror)?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.ends_with(".seg"))
            .collect();
        names.sort();
        let (mut equal, mut bytes) = (0, 0);
        for (index, name) in names.iter().enumerate() {
            let (mut ours, mut theirs) =
                (std::fs::read(origin.join(name))?, std::fs::read(mirror.join(name))?);
            if index + 1 == names.len() {
                // The active segment ends with prepared zeros.
                for file in [&mut ours, &mut theirs] {
                    let used = file.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
                    file.truncate(used);
                }
            }
            bytes += theirs.len();
            equal += usize::from(ours == theirs);
        }
        let came = format!("{equal} of {}, {} KiB", names.len(), bytes / 1024);
        self.note(
            "segment files of the mirror that equal the origin's",
            &came,
            equal == names.len(),
        );
        Ok(())
    }

    fn say(&self, what: &str) {
        println!("[{:6.2} s] {what}", self.started.elapsed().as_secs_f64());
    }

    fn note(&mut self, what: &str, came: &str, agrees: bool) {
        self.results.push((what.to_owned(), came.to_owned(), agrees));
    }

    fn print_results(&self) {
        let width = self.results.iter().map(|(what, _, _)| what.len()).max().unwrap_or(0);
        println!();
        for (what, came, agrees) in &self.results {
            println!("{} {what:width$}  {came}", if *agrees { "ok  " } else { "FAIL" });
        }
        println!("\n{:.1} s in all", self.started.elapsed().as_secs_f64());
    }
}

/// Reads the progress of `orders` up to `until`; what it has acknowledged by then.
fn follow_until(orders: &mut Service, all: usize, until: usize) -> Result<usize> {
    let bar = std::io::stdout().is_terminal();
    loop {
        let done = appended(&orders.line()?).ok_or("orders said something unexpected")?;
        if bar {
            print!("\r           orders has appended {done} of {all} \r");
            std::io::stdout().flush()?;
        }
        if done >= until {
            return Ok(done);
        }
    }
}

fn appended(line: &[String]) -> Option<usize> {
    match line {
        [word, count] if word == "appended" => count.parse().ok(),
        _ => None,
    }
}

/// The service's first line.
fn customers_ready(customers: &mut Service) -> Result<Vec<String>> {
    customers.line()
}

/// Waits until the view has applied `position`; how the service is then.
fn wait_for_status(customers: &mut Service, position: usize) -> Result<Vec<String>> {
    customers.ask(&format!("wait {position}"))?;
    customers.ask("status")
}

fn word(line: &[String], index: usize) -> &str {
    line.get(index).map_or("", String::as_str)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| "the path is not UTF-8".into())
}

fn ms(elapsed: Duration) -> String {
    format!("{:.1} ms", elapsed.as_secs_f64() * 1000.0)
}
