//! `weft ingress serve`, `routes` and `explain`, and the routes of the agent's socket that answer them.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::routing::get;
use clap::{Args, Subcommand};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid};
use serde::Deserialize;
use tokio::sync::watch;
use weft_ingress::explain::{Question, explain, routes};
use weft_ingress::lint::lint;
use weft_ingress::plan::IngressPlanner;
use weft_ingress::plan::table::RouteTable;
use weft_ingress::proxy::{Handover, process};
use weft_model::Snapshot;
use weft_model::constants::{INGRESS_HTTP_PORT, INGRESS_HTTPS_PORT, INGRESS_USER};
use weft_netstack::kernel::memory::be_frugal;
use weft_netstack::reconcile::Planner as _;

use crate::kept::Kept;
use crate::log::LogArgs;
use crate::status::{PATIENCE, ask};

#[derive(Args)]
pub(crate) struct IngressArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print the table of routes, host by host, in the order in which they are tried
    Routes(RoutesArgs),
    /// Say what becomes of a request: which object, rule and endpoint, and why not another
    Explain(ExplainArgs),
    /// Serve the routes that the agent wrote: the proxy process, which gives up the rights of root as soon as it listens
    Serve(ServeArgs),
}

#[derive(Args)]
struct ServeArgs {
    /// Where ingress/routes.json is read and ingress/ingress.sock is served
    #[arg(long, default_value = "/run/weft")]
    run_dir: PathBuf,
    /// Port for HTTP on each address of the table
    #[arg(long, default_value_t = INGRESS_HTTP_PORT)]
    http_port: u16,
    /// Port for HTTPS
    #[arg(long, default_value_t = INGRESS_HTTPS_PORT)]
    https_port: u16,
    /// One for each core when it is not given
    #[arg(long)]
    threads: Option<usize>,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Args)]
struct RoutesArgs {
    /// Where the agent's socket is
    #[arg(long, default_value = "/run/weft")]
    run_dir: PathBuf,
}

#[derive(Args)]
struct ExplainArgs {
    /// Such as GET
    method: String,
    /// Such as https://shop.example.com/cart
    url: String,
    /// Where the agent's socket is
    #[arg(long, default_value = "/run/weft")]
    run_dir: PathBuf,
}

pub(crate) fn run(args: &IngressArgs) -> anyhow::Result<()> {
    let text = match &args.command {
        Command::Serve(args) => return serve(args),
        Command::Routes(RoutesArgs { run_dir }) => ask(run_dir, "/ingress/routes", PATIENCE)?,
        Command::Explain(ExplainArgs { method, url, run_dir }) => {
            Question::new(method, url)?;
            let path = format!(
                "/ingress/explain?method={}&url={}",
                crate::policy::escape(method),
                crate::policy::escape(url)
            );
            ask(run_dir, &path, PATIENCE)?
        }
    };
    crate::print(&text)
}

fn serve(args: &ServeArgs) -> anyhow::Result<()> {
    args.log.start()?;
    let control = process::bind(&args.run_dir)?;
    let kept = Kept::from_environment();
    let handover = Handover::new(kept.tcp, kept.store);
    give_up_root().context("give up the rights of root")?;
    be_frugal();
    process::run(
        process::Config {
            run_dir: args.run_dir.clone(),
            http_port: args.http_port,
            https_port: args.https_port,
            threads: args.threads,
            handover,
        },
        control,
    )?;
    Ok(())
}

/// For ever: the process becomes a user that owns nothing on this host, with no capability and no way back.
fn give_up_root() -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    if geteuid().is_root() {
        setgroups(&[])?;
        setresgid(Gid::from(INGRESS_USER), Gid::from(INGRESS_USER), Gid::from(INGRESS_USER))?;
        setresuid(Uid::from(INGRESS_USER), Uid::from(INGRESS_USER), Uid::from(INGRESS_USER))?;
    }
    prctl::set_no_new_privs()
}

const NOT_SERVED: &str = "Ingresses are not served here: the agent runs with --ingress off";

type Snapshots = watch::Receiver<Option<Arc<Snapshot>>>;

/// For the agent's Unix socket.
pub(crate) fn router(snapshots: Snapshots) -> Router {
    Router::new()
        .route("/ingress/routes", get(answer_routes))
        .route("/ingress/explain", get(answer_explain))
        .route("/ingress/lint", get(answer_lint))
        .with_state(snapshots)
}

type Answer = Result<String, (StatusCode, String)>;

fn snapshot(snapshots: &Snapshots) -> Result<Arc<Snapshot>, (StatusCode, String)> {
    let none =
        || (StatusCode::SERVICE_UNAVAILABLE, "the agent has not read this cluster's objects yet".to_owned());
    snapshots.borrow().clone().ok_or_else(none)
}

/// The table of now, unless no Ingress is anybody's business here.
fn table(snapshots: &Snapshots) -> Result<RouteTable, (StatusCode, String)> {
    let snapshot = snapshot(snapshots)?;
    if !snapshot.config.ingress.on {
        return Err((StatusCode::UNPROCESSABLE_ENTITY, NOT_SERVED.to_owned()));
    }
    Ok(IngressPlanner::default().plan(&snapshot).plan)
}

async fn answer_routes(State(snapshots): State<Snapshots>) -> Answer {
    Ok(routes(&table(&snapshots)?))
}

#[derive(Deserialize)]
struct Asked {
    method: String,
    url: String,
}

async fn answer_explain(State(snapshots): State<Snapshots>, Query(asked): Query<Asked>) -> Answer {
    let question = Question::new(&asked.method, &asked.url)
        .map_err(|error| (StatusCode::UNPROCESSABLE_ENTITY, error.to_string()))?;
    let lines = explain(&table(&snapshots)?, &question);
    Ok(lines.iter().map(|line| format!("{line}\n")).collect())
}

async fn answer_lint(State(snapshots): State<Snapshots>) -> Answer {
    let snapshot = snapshot(&snapshots)?;
    let mut text = crate::lint::text(&lint(&snapshot, true));
    if !snapshot.config.ingress.on {
        text.push_str(NOT_SERVED);
        text.push('\n');
    }
    Ok(text)
}
